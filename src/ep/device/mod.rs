//! A rank that has a device: its calls meet the others on the host, and put work on the device, which is watched.

mod memory;
mod pulse;
mod watchdog;

pub(super) use memory::{Shares, address_of, fresh, room_of};

pub(super) use watchdog::Carrier;

use super::call::{Place, Site, Terms};
use super::control::{Control, Notes};
use super::error::{Collective, EpError, EpErrorKind, reason};
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, sys as driver};
use candle_core::{CudaDevice, Device, Tensor};
use memory::with_address;
use pulse::Pulse;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;
use watchdog::{Entry, GivenUp, Watchdog};

/// What a rank with a device is made of; `C` is what carries its rows to the others.
pub(super) struct OnDevice<C: Carrier> {
    // Ends before the host group hears that this rank leaves.
    watchdog: Watchdog<C>,
    pub(super) control: Box<dyn Control>,
    pub(super) device: Device,
    pub(super) cuda: CudaDevice,
    /// The last call that put work on the device.
    last: Option<Site>,
    /// Whether warm-up is over.
    is_serving: bool,
}

impl<C: Carrier> OnDevice<C> {
    /// Begins to watch. `site` is the meeting of the ranks.
    pub(super) fn start(
        carrier: C,
        mut control: Box<dyn Control>,
        device: &Device,
        cuda: &CudaDevice,
        site: &Site,
    ) -> Result<Self, EpError> {
        let context = Arc::clone(cuda.cuda_stream().context());
        let pulse = Pulse::of_group(&mut *control)?;
        let watch = Watchdog::start(carrier, context, control.overseer(), (control.rank(), pulse));
        let watchdog = watch.map_err(|error| {
            let what = format!("the device cannot be watched: {error}");
            control.give_up(site, EpErrorKind::Library(what))
        })?;
        Ok(Self { watchdog, control, device: device.clone(), cuda: cuda.clone(), last: None, is_serving: false })
    }

    /// The last call that put work on the device.
    pub(super) fn last(&self) -> Option<Site> {
        self.last.clone()
    }

    /// The end of a call that put work on the device: during warm-up the ranks meet once more.
    ///
    /// Whoever goes on may load kernels, for which the driver may stop all threads until this rank's device is done; that waits for
    /// ranks whose work is not on its way yet, and would wait for ever. When all have met, it is.
    pub(super) fn leave(&mut self, site: &Site) -> Result<(), EpError> {
        self.last = Some(site.clone());
        match self.is_serving {
            true => Ok(()),
            false => self.control.barrier(),
        }
    }

    pub(super) fn is_serving(&self) -> bool {
        self.is_serving
    }

    /// Warm-up is over: kernels are loaded.
    pub(super) fn start_serving(&mut self) {
        self.is_serving = true;
        self.control.start_serving();
    }

    /// Leaves, and joins the next generation on the host.
    pub(super) fn rebuilt(self) -> Result<(Box<dyn Control>, Device), EpError> {
        let Self { watchdog, control, device, .. } = self;
        drop(watchdog);
        Ok((control.rebuilt()?, device))
    }

    pub(super) fn place(&self) -> Place<'_> {
        Place { device: &self.device, rank: self.control.rank(), world_size: self.control.world_size() }
    }

    pub(super) fn announce(
        &mut self,
        op: Collective,
        terms: Result<Terms, String>,
        note: Vec<u8>,
    ) -> Result<(Site, Notes, Instant), EpError> {
        let arrived = Instant::now();
        let (site, notes) = self.control.announce(op, terms.map(|terms| (terms, note)))?;
        Ok((site, notes, arrived))
    }

    /// Has `work` enqueue what fills a new tensor of `shape` from `rows`.
    pub(super) fn carry(
        &mut self,
        (site, arrived): (&Site, Instant),
        rows: &Tensor,
        shape: &[usize],
        work: impl FnOnce(&C, &CudaStream, u64, u64) -> Result<(), String>,
    ) -> Result<Tensor, EpError> {
        let carried = rows.contiguous().map_err(|error| tensor_kind(&error)).and_then(|rows| {
            fresh(&self.cuda, rows.dtype(), shape, |to| {
                with_address(&rows, &self.cuda, |from| {
                    self.enqueue(site, arrived, |carrier, stream| work(carrier, stream, from, to))
                })
            })
        });
        let carried = carried.map_err(|kind| self.control.give_up(site, kind))?;
        self.leave(site)?;
        Ok(carried)
    }

    /// Enters the library, and hands the watchdog an event behind the work.
    pub(super) fn enqueue(
        &self,
        site: &Site,
        arrived: Instant,
        work: impl FnOnce(&C, &CudaStream) -> Result<(), String>,
    ) -> Result<(), EpErrorKind> {
        self.put((site, arrived, Entry::Call), work)
    }

    /// More work of the call that was enqueued last.
    pub(super) fn enqueue_more(
        &self,
        site: &Site,
        work: impl FnOnce(&C, &CudaStream) -> Result<(), String>,
    ) -> Result<(), EpErrorKind> {
        self.put((site, Instant::now(), Entry::More), work)
    }

    fn put(
        &self,
        (site, since, entry): (&Site, Instant, Entry),
        work: impl FnOnce(&C, &CudaStream) -> Result<(), String>,
    ) -> Result<(), EpErrorKind> {
        let stream = self.cuda.cuda_stream();
        let is_captured = self.is_captured()?;
        stream.context().bind_to_thread().map_err(|error| device_kind(&error))?;
        let carrier = self.watchdog.enter((site, entry), since, self.control.deadline()).map_err(given_up)?;
        let done = work(&carrier, &stream);
        let behind = match &done {
            Ok(()) if !is_captured => Some(self.event()),
            _ => None,
        };
        let (behind, recorded) = match behind {
            Some(Ok(event)) => (Some(event), Ok(())),
            Some(Err(kind)) => (None, Err(kind)),
            None => (None, Ok(())),
        };
        self.watchdog.leave(behind).map_err(given_up)?;
        done.map_err(EpErrorKind::Library)?;
        recorded
    }

    /// An event behind everything that the stream has been given.
    fn event(&self) -> Result<CudaEvent, EpErrorKind> {
        let stream = self.cuda.cuda_stream();
        let event = stream.context().new_event(None).map_err(|error| device_kind(&error))?;
        event.record(&stream).map_err(|error| device_kind(&error))?;
        Ok(event)
    }

    pub(super) fn is_captured(&self) -> Result<bool, EpErrorKind> {
        let status = self.cuda.cuda_stream().capture_status().map_err(|error| device_kind(&error))?;
        Ok(status != driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Watches over what the stream has been given besides calls, such as graphs.
    fn watch_everything(&self, site: &Site) -> Result<(), EpErrorKind> {
        if self.is_captured()? {
            return Err(EpErrorKind::BadArgument(
                "the stream is being captured, there is nothing to wait for".to_string(),
            ));
        }
        self.watchdog.enter((site, Entry::Call), Instant::now(), self.control.deadline()).map_err(given_up)?;
        let (event, recorded) = match self.event() {
            Ok(event) => (Some(event), Ok(())),
            Err(kind) => (None, Err(kind)),
        };
        self.watchdog.leave(event).map_err(given_up)?;
        recorded
    }

    /// Waits for the device; see [`Communicator::settle`].
    pub(super) fn settle(&mut self) -> Result<(), EpError> {
        let Some(site) = self.last.clone() else { return Ok(()) };
        let watched = self.watch_everything(&site);
        // What was torn counts more: it has the name of the call.
        self.watchdog.wait().map_err(|torn| {
            let what = "the group was given up before the device was done with it".to_string();
            self.control.give_up(&torn, EpErrorKind::Library(what))
        })?;
        watched.map_err(|kind| self.control.give_up(&site, kind))
    }
}

pub(super) fn tensor_kind(error: &candle_core::Error) -> EpErrorKind {
    EpErrorKind::Tensor(reason(error))
}

pub(super) fn device_kind(error: &impl fmt::Display) -> EpErrorKind {
    EpErrorKind::Library(format!("the device failed: {error}"))
}

/// There is a cause, which counts more than this.
pub(super) fn group_given_up() -> EpErrorKind {
    EpErrorKind::Library("the group was given up".to_string())
}

fn given_up(_: GivenUp) -> EpErrorKind {
    group_given_up()
}
