//! A maximum flow (Dinic's algorithm), for the planner.

/// A network with whole capacities.
pub(super) struct Network {
    /// Edges out of each node; edge `e` and its reverse `e ^ 1` stand side by side.
    out: Vec<Vec<usize>>,
    edges: Vec<Edge>,
}

struct Edge {
    to: usize,
    /// What may still flow.
    room: usize,
}

impl Network {
    pub(super) fn new(num_nodes: usize) -> Self {
        Self { out: vec![Vec::new(); num_nodes], edges: Vec::new() }
    }

    /// An edge; its number is for [`flow`](Self::flow).
    pub(super) fn edge(&mut self, from: usize, to: usize, capacity: usize) -> usize {
        let number = self.edges.len();
        self.out[from].push(number);
        self.out[to].push(number + 1);
        self.edges.extend([Edge { to, room: capacity }, Edge { to: from, room: 0 }]);
        number
    }

    /// What flows through an edge: what may flow back.
    pub(super) fn flow(&self, edge: usize) -> usize {
        self.edges[edge ^ 1].room
    }

    /// Adds as much flow from `source` to `sink` as there can be, and says how much was added. What an edge into the sink
    /// carries already stays.
    pub(super) fn fill(&mut self, source: usize, sink: usize) -> usize {
        let mut added = 0;
        while let Some(levels) = self.levels(source, sink) {
            let mut tried = vec![0; self.out.len()];
            while let Some(path) = self.path(source, sink, &levels, &mut tried) {
                let amount = path.iter().map(|&edge| self.edges[edge].room).min().unwrap_or(0);
                for edge in path {
                    self.edges[edge].room -= amount;
                    self.edges[edge ^ 1].room += amount;
                }
                added += amount;
            }
        }
        added
    }

    /// The distance of every node from the source; `None` where the sink cannot be reached.
    fn levels(&self, source: usize, sink: usize) -> Option<Vec<usize>> {
        let mut levels = vec![usize::MAX; self.out.len()];
        levels[source] = 0;
        let mut queue = vec![source];
        let mut next = 0;
        while let Some(&node) = queue.get(next) {
            next += 1;
            for &edge in &self.out[node] {
                let Edge { to, room } = self.edges[edge];
                if room > 0 && levels[to] == usize::MAX {
                    levels[to] = levels[node] + 1;
                    queue.push(to);
                }
            }
        }
        (levels[sink] != usize::MAX).then_some(levels)
    }

    /// A path along rising levels. `tried` are the edges of each node that lead nowhere any more.
    fn path(&self, source: usize, sink: usize, levels: &[usize], tried: &mut [usize]) -> Option<Vec<usize>> {
        let mut path: Vec<usize> = Vec::new();
        let mut node = source;
        while node != sink {
            match self.out[node].get(tried[node]) {
                Some(&edge) => {
                    let Edge { to, room } = self.edges[edge];
                    if room > 0 && levels[to] == levels[node].wrapping_add(1) {
                        path.push(edge);
                        node = to;
                    } else {
                        tried[node] += 1;
                    }
                }
                None => {
                    node = self.edges[path.pop()? ^ 1].to;
                    tried[node] += 1;
                }
            }
        }
        Some(path)
    }
}
