//! One test body for all devices: the CPU's result is what a test looks at, and where there is a CUDA device its result must
//! be the same. Without the feature `cuda` there is the CPU alone; with it and without a device tests say that they skip
//! CUDA, or fail if `CANDLE_MOE_REQUIRE_CUDA=1`.

use candle_core::{DType, Device, Result, Tensor};
use candle_moe::order::{ExpertMap, ExpertOrder, NO_EXPERT, NO_SLOT, OrderOptions, RoutedOrder};
use candle_moe::routing::{Router, Routing, RoutingMethod};
use std::ops::Range;
#[cfg(feature = "cuda")]
use std::sync::LazyLock;

/// The CUDA device of the tests, if there is one.
#[cfg(feature = "cuda")]
pub(crate) fn cuda() -> Option<&'static Device> {
    static DEVICE: LazyLock<Option<Device>> = LazyLock::new(|| match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or_default();
            let required = std::env::var_os("CANDLE_MOE_REQUIRE_CUDA").is_some_and(|value| value == "1");
            assert!(!required, "no CUDA device: {reason}");
            say(&format!("SKIPPED on CUDA: no device ({reason})"));
            None
        }
    });
    DEVICE.as_ref()
}

/// Says it past the test harness, which shows what passing tests print to nobody.
pub(crate) fn say(line: &str) {
    use std::io::Write;
    let mut stderr = std::io::stderr().lock();
    writeln!(stderr, "{line}").unwrap();
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda() -> Option<&'static Device> {
    None
}

/// The CPU, and the CUDA device if there is one.
pub(crate) fn all() -> impl Iterator<Item = Device> {
    std::iter::once(Device::Cpu).chain(cuda().cloned())
}

/// Whether it is a stand-in that runs on the CPU.
pub(crate) fn is_emulated(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return device.cuda_stream().context().name().is_ok_and(|name| name.contains("emulator"));
    }
    let _ = device;
    false
}

/// Those of them that have matrix products, which an emulated device has only with an emulated cuBLAS.
pub(crate) fn with_products() -> impl Iterator<Item = Device> {
    all().filter(|device| {
        let one = Tensor::ones((1, 1), DType::F32, device).unwrap();
        let Err(error) = one.matmul(&one) else { return true };
        let error = line(error);
        assert!(error.contains("CUBLAS_STATUS_NOT_SUPPORTED"), "no matrix products: {error}");
        say(&format!("SKIPPED on CUDA: no matrix products ({error})"));
        false
    })
}

/// On the CPU. Of a view that is all; Candle would copy the buffer that it lies in.
pub(crate) fn to_host(tensor: &Tensor) -> Tensor {
    let tensor = if tensor.device().is_cpu() { tensor.clone() } else { tensor.force_contiguous().unwrap() };
    tensor.to_device(&Device::Cpu).unwrap()
}

/// The first line of an error, without the stack that Candle adds.
pub(crate) fn line(error: candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => line(*inner),
        other => other.to_string().lines().next().unwrap_or_default().to_string(),
    }
}

/// The same ids, and weights that have the same bits, or differ by `ulps` units in the last place.
#[track_caller]
fn assert_routing(found: &Routing, expected: &Routing, ulps: f32, context: &str) {
    assert_eq!(found.topk_ids.dims(), expected.topk_ids.dims(), "{context}");
    assert_eq!(found.topk_weights.dims(), expected.topk_weights.dims(), "{context}");
    let rows = |routing: &Routing| to_host(&routing.topk_ids).to_vec2::<u32>().unwrap();
    for (token, (found, expected)) in rows(found).into_iter().zip(rows(expected)).enumerate() {
        assert_eq!(found, expected, "{context}: token {token}");
    }
    let weights =
        |routing: &Routing| to_host(&routing.topk_weights.detach()).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (slot, (found, expected)) in weights(found).into_iter().zip(weights(expected)).enumerate() {
        let close = (found - expected).abs() <= ulps * f32::EPSILON * expected.abs();
        assert!(close, "{context}: slot {slot} has {found}, not {expected}");
    }
}

/// The same ids, and weights with the same bits: all methods but `Default`, whose sum over the row is rounded once in the last
/// place.
#[track_caller]
pub(crate) fn assert_same_routing(found: &Routing, expected: &Routing, method: RoutingMethod, context: &str) {
    let ulps = if method == RoutingMethod::Default { 1.0 } else { 0.0 };
    assert_routing(found, expected, ulps, &format!("{method}: {context}"));
}

#[track_caller]
pub(crate) fn assert_same_order(found: &ExpertOrder, expected: &ExpertOrder, context: &str) {
    let parts = |order: &ExpertOrder| {
        [&order.expert_counts, &order.expert_offsets, &order.sorted_slots, &order.slot_rank]
            .map(|part| to_host(part).to_vec1::<u32>().unwrap())
    };
    for ((found, expected), part) in
        parts(found).into_iter().zip(parts(expected)).zip(["counts", "offsets", "slots", "ranks"])
    {
        assert_eq!(found, expected, "{context}: {part}");
    }
    assert_eq!((found.num_tokens(), found.top_k()), (expected.num_tokens(), expected.top_k()), "{context}");
    assert_eq!(found.local_experts(), expected.local_experts(), "{context}");
}

/// The CPU's outcome; that of the CUDA device must be the same, or the same error.
#[track_caller]
fn everywhere<T>(on: impl Fn(&Device) -> Result<T>, same: impl Fn(&T, &T)) -> Result<T> {
    let expected = on(&Device::Cpu);
    if let Some(device) = cuda() {
        match (on(device), &expected) {
            (Ok(found), Ok(expected)) => same(&found, expected),
            (Err(found), Err(expected)) => {
                assert_eq!(line(found), expected.to_string().lines().next().unwrap_or_default())
            }
            (Ok(_), Err(expected)) => panic!("no error on CUDA, expected: {expected}"),
            (Err(found), Ok(_)) => panic!("an error on CUDA only: {found}"),
        }
    }
    expected
}

/// Routing on every device.
pub(crate) trait RouteEverywhere {
    fn route_everywhere(&self, logits: &Tensor) -> Result<Routing>;
    fn route_padded_everywhere(&self, logits: &Tensor, num_valid_tokens: &Tensor) -> Result<Routing>;
}

impl RouteEverywhere for Router {
    #[track_caller]
    fn route_everywhere(&self, logits: &Tensor) -> Result<Routing> {
        everywhere(
            |device| self.route(&logits.to_device(device)?),
            |a, b| assert_same_routing(a, b, self.method(), "on CUDA"),
        )
    }

    #[track_caller]
    fn route_padded_everywhere(&self, logits: &Tensor, num_valid_tokens: &Tensor) -> Result<Routing> {
        everywhere(
            |device| self.route_padded(&logits.to_device(device)?, &num_valid_tokens.to_device(device)?),
            |a, b| assert_same_routing(a, b, self.method(), "padded, on CUDA"),
        )
    }
}

/// Routing and order in one step, on every device, against the separate steps on the CPU.
#[track_caller]
pub(crate) fn routed(router: &Router, logits: &Tensor, options: &OrderOptions, context: &str) -> RoutedOrder {
    let on = |device: &Device| {
        let num_valid_tokens = options.num_valid_tokens.as_ref().map(|n| n.to_device(device)).transpose()?;
        RoutedOrder::new(router, &logits.to_device(device)?, &OrderOptions { num_valid_tokens, ..options.clone() })
    };
    let same = |found: &RoutedOrder, expected: &RoutedOrder| {
        assert_same_routing(&found.routing, &expected.routing, router.method(), context);
        assert_same_order(&found.order, &expected.order, context);
        let tiles = |routed: &RoutedOrder| {
            let tiles = routed.tiles.as_ref()?;
            Some([&tiles.tile_experts, &tiles.tile_starts].map(|t| to_host(t).to_vec1::<u32>().unwrap()))
        };
        assert_eq!(tiles(found), tiles(expected), "{context}: tiles");
    };
    let found = everywhere(on, same).unwrap();
    let routing = match &options.num_valid_tokens {
        Some(num_valid) => router.route_padded(logits, num_valid).unwrap(),
        None => router.route(logits).unwrap(),
    };
    assert_same_routing(&found.routing, &routing, router.method(), context);
    let num_experts = logits.dims()[1];
    let local = options.local_experts.clone();
    let order = match &options.map {
        Some(map) => ExpertOrder::with_map(&routing.topk_ids, map, local.unwrap_or(0..map.num_physical())),
        None => ExpertOrder::new(&routing.topk_ids, num_experts, local.unwrap_or(0..num_experts)),
    };
    assert_same_order(&found.order, &order.unwrap(), context);
    found
}

/// An order of given ids on every device; the CPU's.
#[track_caller]
pub(crate) fn order(topk_ids: &Tensor, num_experts: usize, local: Range<usize>) -> ExpertOrder {
    let on = |device: &Device| ExpertOrder::new(&topk_ids.to_device(device)?, num_experts, local.clone());
    everywhere(on, |a, b| assert_same_order(a, b, "on CUDA")).unwrap()
}

/// The same with a map.
#[track_caller]
pub(crate) fn mapped(topk_ids: &Tensor, map: &ExpertMap, local: Range<usize>) -> ExpertOrder {
    let on = |device: &Device| ExpertOrder::with_map(&topk_ids.to_device(device)?, map, local.clone());
    everywhere(on, |a, b| assert_same_order(a, b, "mapped, on CUDA")).unwrap()
}

/// The same order on a device, made from its ids: those of the local experts, counted from the first.
pub(crate) fn order_to(device: &Device, order: &ExpertOrder) -> ExpertOrder {
    let offsets = order.expert_offsets.to_vec1::<u32>().unwrap();
    let expert = |rank: u32| match rank {
        NO_SLOT => NO_EXPERT,
        rank => offsets.partition_point(|&offset| offset <= rank) as u32 - 1,
    };
    let ids: Vec<u32> = order.slot_rank.to_vec1::<u32>().unwrap().into_iter().map(expert).collect();
    let ids = Tensor::from_vec(ids, (order.num_tokens(), order.top_k()), device).unwrap();
    let num_local = order.expert_counts.dims()[0];
    ExpertOrder::new(&ids, num_local, 0..num_local).unwrap()
}
