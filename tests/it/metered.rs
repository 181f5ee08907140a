//! What a rank sends, counted by itself and worked out from the arguments of all.

use crate::ep::tensor;
use candle_moe::ep::{Collective, Communicator, Metered, Transfer, launch};
use std::time::Duration;

const PATIENT: Duration = Duration::from_secs(20);
const ROW_BYTES: usize = crate::ep::WIDTH * 4;

fn transfer(op: Collective, rows_sent: usize, rows_received: usize, rows_kept: usize) -> Transfer {
    Transfer { op, rows_sent, rows_received, rows_kept, row_bytes: ROW_BYTES }
}

#[test]
fn every_collective_is_counted() {
    let counts = [2, 0, 5];
    // `sends[r][d]`: rows from r to d.
    let sends = [[1, 2, 3], [0, 4, 0], [6, 0, 0]];
    let transfers = launch(3, PATIENT, |mut ranks| {
        let rank = ranks.rank();
        let rows = |num_rows: usize| tensor(&vec![vec![1.0; crate::ep::WIDTH]; num_rows]);
        let mut metered = Metered::new(&mut ranks);
        let gathered = metered.all_gather(&rows(counts[rank]), &counts).unwrap();
        assert_eq!(gathered.dims(), [7, crate::ep::WIDTH]);
        metered.reduce_scatter(&rows(7), &counts).unwrap();
        let (_, received) = metered.all_to_all(&rows(sends[rank].iter().sum()), &sends[rank]).unwrap();
        assert_eq!(received, sends.map(|send| send[rank]));
        metered.all_reduce(&rows(4)).unwrap();
        metered.barrier().unwrap();
        metered.all_gather_bytes(b"not rows").unwrap();
        let transfers = metered.take_transfers();
        assert_eq!(metered.take_transfers(), []);
        transfers
    });
    for (rank, transfers) in transfers.unwrap().into_iter().enumerate() {
        let (own, all) = (counts[rank], 7);
        let received: usize = sends.iter().map(|send| send[rank]).sum();
        let (sent, kept) = (sends[rank].iter().sum::<usize>(), sends[rank][rank]);
        let expected = [
            transfer(Collective::AllGather, 2 * own, all - own, own),
            transfer(Collective::ReduceScatter, all - own, 2 * own, own),
            transfer(Collective::AllToAll, sent - kept, received - kept, kept),
            transfer(Collective::AllReduce, 8, 8, 4),
        ];
        assert_eq!(transfers.unwrap(), expected, "rank {rank}");
        assert_eq!((expected[3].bytes_sent(), expected[3].bytes_kept()), (8 * ROW_BYTES, 4 * ROW_BYTES));
    }
}

#[test]
fn a_call_that_fails_is_not_counted() {
    let mut alone = candle_moe::ep::Solo::new();
    let mut metered = Metered::new(&mut alone);
    assert!(metered.all_gather(&tensor(&[]), &[1]).is_err());
    assert!(metered.barrier().is_err(), "the group is poisoned through the meter too");
    assert_eq!(metered.take_transfers(), []);
}
