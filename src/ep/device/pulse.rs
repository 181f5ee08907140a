//! What ranks of one machine see of each other without a word: the beats of their watchdogs, and how many calls each has begun.
//!
//! A device does not say for whom it waits, and a process that is stopped says nothing at all. So every rank has a place in
//! memory that all of them share, writes there, and reads there when its own device is late.

use super::super::control::Control;
use super::super::error::EpError;
use memmap2::{MmapOptions, MmapRaw};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Memory of the machine as a folder.
const FOLDER: &str = "/dev/shm";
/// Bytes of a rank's place, so that none shares a line of the cache with another.
const PLACE: usize = 64;
/// A watchdog that did not beat for so long is stopped, or gone; it beats every few milliseconds.
const SILENCE: Duration = Duration::from_millis(300);

/// The memory, and this rank.
pub(super) struct Pulse {
    memory: MmapRaw,
    rank: usize,
    begun: u64,
    beats: u64,
    /// By rank: the last beat, and since when it is the last.
    seen: Vec<(u64, Instant)>,
}

/// Numbers of a place.
#[derive(Clone, Copy)]
enum Word {
    Beats,
    Begun,
}

impl Pulse {
    /// Meets the others, who have to be on this machine; without such memory there is none for this rank.
    pub(super) fn of_group(control: &mut dyn Control) -> Result<Option<Self>, EpError> {
        let (rank, num_ranks) = (control.rank(), control.world_size());
        let made = if rank == 0 { create(num_ranks).ok() } else { None };
        let path = made.as_ref().map(|(path, _)| path.to_string_lossy().into_owned()).unwrap_or_default();
        let paths = control.all_gather_bytes(path.as_bytes());
        let opened = paths.and_then(|paths| {
            let file = match (&made, paths.first()) {
                (Some((_, file)), _) => file.try_clone().ok(),
                (None, Some(path)) => open(Path::new(&*String::from_utf8_lossy(path)), num_ranks).ok(),
                (None, None) => None,
            };
            let memory = file.and_then(|file| MmapOptions::new().len(num_ranks * PLACE).map_raw(&file).ok());
            // Whoever has it keeps it; the name is not needed any more.
            control.barrier().map(|()| memory)
        });
        if let Some((path, _)) = made {
            let _ = fs::remove_file(path);
        }
        let seen = vec![(0, Instant::now()); num_ranks];
        Ok(opened?.map(|memory| Self { memory, rank, begun: 0, beats: 0, seen }))
    }

    /// This rank begins a call.
    pub(super) fn begin(&mut self) {
        self.begun += 1;
        self.word(self.rank, Word::Begun).store(self.begun, Ordering::Release);
    }

    /// This rank's watchdog is there, and looks who else is.
    pub(super) fn beat(&mut self) {
        self.beats += 1;
        self.word(self.rank, Word::Beats).store(self.beats, Ordering::Release);
        for rank in 0..self.seen.len() {
            let beats = self.word(rank, Word::Beats).load(Ordering::Acquire);
            if let Some(seen) = self.seen.get_mut(rank).filter(|(last, _)| *last != beats) {
                *seen = (beats, Instant::now());
            }
        }
    }

    /// The other ranks that have not begun as many calls as this one, or of which nothing is seen any more. Those of which
    /// nothing was seen ever are on other machines.
    pub(super) fn behind(&self) -> Vec<usize> {
        let is_behind = |&(rank, (beats, since)): &(usize, &(u64, Instant))| {
            let begun = self.word(rank, Word::Begun).load(Ordering::Acquire);
            rank != self.rank && *beats > 0 && (begun < self.begun || since.elapsed() > SILENCE)
        };
        self.seen.iter().enumerate().filter(is_behind).map(|(rank, _)| rank).collect()
    }

    fn word(&self, rank: usize, word: Word) -> &AtomicU64 {
        debug_assert!(rank < self.seen.len());
        // SAFETY: the memory has a place for each rank, at a multiple of its size, zero at first, and all access to it is atomic.
        unsafe { &*self.memory.as_ptr().add(rank * PLACE + word as usize * size_of::<u64>()).cast::<AtomicU64>() }
    }
}

/// A new file with a place for each rank.
fn create(num_ranks: usize) -> io::Result<(PathBuf, File)> {
    let folder = if Path::new(FOLDER).is_dir() { PathBuf::from(FOLDER) } else { std::env::temp_dir() };
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = folder.join(format!("candle-moe-{process}-{number}-{since}"));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    match file.set_len((num_ranks * PLACE) as u64) {
        Ok(()) => Ok((path, file)),
        Err(error) => {
            let _ = fs::remove_file(path);
            Err(error)
        }
    }
}

/// The file that rank 0 has made, where that is this machine.
fn open(path: &Path, num_ranks: usize) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    match file.metadata()?.len() == (num_ranks * PLACE) as u64 {
        true => Ok(file),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}
