//! Routing: `router_logits` to the chosen experts and their weights.
//!
//! [`Router::route`] is one fused Candle custom op. Its contract, the same for every method, dtype and device:
//!
//! * `router_logits` is `[num_tokens, num_experts]` in f32, f16 or bf16, with any strides and start offset; the
//!   scores are computed in float32. Zero tokens give empty outputs.
//! * `topk_ids` is u32 `[num_tokens, top_k]`: `top_k` distinct ids below `num_experts`, best first. Ties go to the
//!   lower id; -0 equals +0; NaN ranks below every number, -inf included. `top_k` is exact, from 1 to `num_experts`.
//! * `topk_weights` is f32 `[num_tokens, top_k]`: finite and not negative for every bit pattern of input. A chosen NaN
//!   or -inf has weight 0, unless nothing better was chosen: then the weights of the row are equal. Several +inf share
//!   the weight equally.
//! * [`Router::route_padded`] takes a number of valid tokens: rows from there on are padding and are routed to
//!   [`NO_EXPERT`] with weight 0.
//! * The weights are differentiable with respect to the logits for every method; the choice itself has no gradient, nor
//!   has the selection bias. A row whose best chosen logit is not finite has gradient 0, and so has padding.
//!
//! What chooses and what the weights are: [`RoutingMethod`].

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod method;

pub use method::{ExpertGroups, RoutingMethod};

use crate::copied::Copied;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use std::sync::{Arc, OnceLock};

const OP: &str = "topk-routing";

/// The id in a slot of a padding token: no expert.
pub const NO_EXPERT: u32 = u32::MAX;

/// The outcome of routing: who was chosen, and with what weight.
#[derive(Debug, Clone)]
pub struct Routing {
    /// u32 `[num_tokens, top_k]`, best first.
    pub topk_ids: Tensor,
    /// f32 `[num_tokens, top_k]`, in the order of `topk_ids`.
    pub topk_weights: Tensor,
}

/// A routing method with its `top_k` and, where the method has one, its selection bias.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_moe::routing::{Router, RoutingMethod};
/// let router = Router::new(RoutingMethod::Renormalize, 2)?;
/// let logits = Tensor::new(&[[0f32, 1., 3., 1.]], &Device::Cpu)?;
/// let routing = router.route(&logits)?;
/// assert_eq!(routing.topk_ids.to_vec2::<u32>()?, [[2, 1]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Router {
    method: RoutingMethod,
    top_k: usize,
    selection_bias: Option<Arc<Copied<f32>>>,
}

impl Router {
    /// A router that chooses `top_k` experts per token.
    ///
    /// # Errors
    /// `top_k` is 0, or the method has a factor that is negative or not finite.
    pub fn new(method: RoutingMethod, top_k: usize) -> Result<Self> {
        method.check(OP)?;
        if top_k == 0 {
            bail!("{OP}: top_k is 0, expected at least 1")
        }
        Ok(Self { method, top_k, selection_bias: None })
    }

    /// Adds `bias`, `[num_experts]` in f32, f16 or bf16, to the score that chooses; never to the weights.
    ///
    /// # Errors
    /// The method takes no bias, or `bias` is not a float vector.
    pub fn with_selection_bias(mut self, bias: &Tensor) -> Result<Self> {
        if !self.method.takes_selection_bias() {
            bail!("{OP}: method {} takes no selection bias", self.method)
        }
        if bias.rank() != 1 || !is_logit_dtype(bias.dtype()) {
            bail!(
                "{OP}: selection bias has shape {:?} and dtype {:?}, expected [num_experts] in f32, f16 or bf16",
                bias.dims(),
                bias.dtype()
            )
        }
        self.selection_bias = Some(Arc::new(Copied::new(bias.to_dtype(DType::F32)?.to_vec1()?)));
        Ok(self)
    }

    /// The routing method.
    pub fn method(&self) -> RoutingMethod {
        self.method
    }

    /// Experts chosen per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// This router with its selection bias left out, for planned logits that no bias may disturb.
    pub fn without_selection_bias(&self) -> Self {
        Self { selection_bias: None, ..self.clone() }
    }

    /// Routes `router_logits` `[num_tokens, num_experts]`; see the [module](self) for the contract.
    ///
    /// # Errors
    /// `router_logits` is not a matrix of f32, f16 or bf16, has fewer than `top_k` experts or another number of
    /// experts than the selection bias, has experts that do not divide into the method's groups, or lives on a device
    /// without an implementation.
    pub fn route(&self, router_logits: &Tensor) -> Result<Routing> {
        self.apply(router_logits, None)
    }

    /// Routes the first `num_valid_tokens` rows; the rows after them are padding: their ids are [`NO_EXPERT`], their weights
    /// 0, and their logits are not read.
    ///
    /// `num_valid_tokens` is u32 with one element, on the device of the logits, so that a captured graph serves any number
    /// of tokens; a number above `num_tokens` means that all are valid.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_moe::routing::{NO_EXPERT, Router, RoutingMethod};
    /// let router = Router::new(RoutingMethod::Renormalize, 1)?;
    /// let logits = Tensor::new(&[[0f32, 1.], [1., 0.], [0., 0.]], &Device::Cpu)?;
    /// let routing = router.route_padded(&logits, &Tensor::new(2u32, &Device::Cpu)?)?;
    /// assert_eq!(routing.topk_ids.to_vec2::<u32>()?, [[1], [0], [NO_EXPERT]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`route`](Self::route); `num_valid_tokens` has another shape, dtype or device.
    pub fn route_padded(&self, router_logits: &Tensor, num_valid_tokens: &Tensor) -> Result<Routing> {
        Self::check_num_valid(router_logits, num_valid_tokens)?;
        self.apply(router_logits, Some(num_valid_tokens.clone()))
    }

    /// One element of u32 on the device of the logits.
    pub(crate) fn check_num_valid(router_logits: &Tensor, num_valid_tokens: &Tensor) -> Result<()> {
        if num_valid_tokens.elem_count() != 1 || num_valid_tokens.dtype() != DType::U32 {
            bail!(
                "{OP}: num_valid_tokens has shape {:?} and dtype {:?}, expected one element of u32",
                num_valid_tokens.shape(),
                num_valid_tokens.dtype()
            )
        }
        if num_valid_tokens.device().location() != router_logits.device().location() {
            bail!(
                "{OP}: num_valid_tokens is on {:?}, expected {:?} as router_logits",
                num_valid_tokens.device().location(),
                router_logits.device().location()
            )
        }
        Ok(())
    }

    fn apply(&self, router_logits: &Tensor, num_valid_tokens: Option<Tensor>) -> Result<Routing> {
        let topk_ids = Arc::default();
        self.apply_op(
            router_logits,
            TopK {
                router: self.clone(),
                num_valid_tokens,
                topk_ids,
                #[cfg(feature = "cuda")]
                cuda: None,
            },
        )
    }

    /// Routes on CUDA with a launch of the caller's, which goes on from the ids.
    #[cfg(feature = "cuda")]
    pub(crate) fn route_with(&self, router_logits: &Tensor, cuda: CudaBody) -> Result<Routing> {
        let op = TopK { router: self.clone(), num_valid_tokens: None, topk_ids: Arc::default(), cuda: Some(cuda) };
        self.apply_op(router_logits, op)
    }

    fn apply_op(&self, router_logits: &Tensor, op: TopK) -> Result<Routing> {
        self.check(router_logits.dtype(), router_logits.shape())?;
        let ids = op.topk_ids.clone();
        let topk_weights = router_logits.apply_op1(op)?;
        match ids.get() {
            Some(ids) => Ok(Routing { topk_ids: ids.clone(), topk_weights }),
            None => bail!("{OP}: the op left no topk_ids"),
        }
    }

    fn check(&self, dtype: DType, shape: &Shape) -> Result<(usize, usize)> {
        let &[num_tokens, num_experts] = shape.dims() else {
            bail!("{OP}: router_logits has shape {shape:?}, expected [num_tokens, num_experts]")
        };
        if !is_logit_dtype(dtype) {
            bail!("{OP}: router_logits has dtype {dtype:?}, expected f32, f16 or bf16")
        }
        if num_experts > u32::MAX as usize {
            bail!("{OP}: num_experts is {num_experts}, expected at most {}", u32::MAX)
        }
        if self.top_k > num_experts {
            bail!("{OP}: top_k is {}, expected at most num_experts, which is {num_experts}", self.top_k)
        }
        self.method.groups().check(OP, num_experts, self.top_k)?;
        match &self.selection_bias {
            Some(bias) if bias.values().len() != num_experts => {
                bail!(
                    "{OP}: selection bias has {} values, expected num_experts, which is {num_experts}",
                    bias.values().len()
                )
            }
            _ => Ok((num_tokens, num_experts)),
        }
    }
}

fn is_logit_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// A custom op returns one tensor, the weights; the ids travel in a slot of the op value.
struct TopK {
    router: Router,
    /// u32, one element; all tokens are valid without it.
    num_valid_tokens: Option<Tensor>,
    topk_ids: Arc<OnceLock<Tensor>>,
    /// What runs on CUDA instead of routing alone.
    #[cfg(feature = "cuda")]
    cuda: Option<CudaBody>,
}

/// Routes on CUDA: writes ids and weights, `[num_tokens, top_k]` both.
#[cfg(feature = "cuda")]
pub(crate) type CudaBody = Arc<dyn Fn(&CudaStorage, &Layout) -> Result<(Tensor, CudaStorage)> + Send + Sync>;

impl CustomOp1 for TopK {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (num_tokens, num_experts) = self.router.check(storage.dtype(), layout.shape())?;
        let num_valid = match &self.num_valid_tokens {
            Some(num_valid) => num_tokens.min(num_valid.flatten_all()?.get(0)?.to_scalar::<u32>()? as usize),
            None => num_tokens,
        };
        let (ids, weights) = match storage {
            CpuStorage::F32(logits) => cpu::route(logits, layout, num_experts, num_valid, &self.router),
            CpuStorage::F16(logits) => cpu::route(logits, layout, num_experts, num_valid, &self.router),
            CpuStorage::BF16(logits) => cpu::route(logits, layout, num_experts, num_valid, &self.router),
            _ => bail!("{OP}: router_logits has dtype {:?}, expected f32, f16 or bf16", storage.dtype()),
        }?;
        let shape = Shape::from((num_tokens, self.router.top_k));
        let ids = Tensor::from_vec(ids, shape.clone(), &candle_core::Device::Cpu)?;
        // A second application of the same op value would be a second choice; the first one stays.
        let _ = self.topk_ids.set(ids);
        Ok((CpuStorage::F32(weights), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (num_tokens, _) = self.router.check(storage.dtype(), layout.shape())?;
        let (ids, weights) = match &self.cuda {
            Some(body) => body(storage, layout),
            None => cuda::route(storage, layout, &self.router, self.num_valid_tokens.as_ref()),
        }?;
        let _ = self.topk_ids.set(ids);
        Ok((weights, Shape::from((num_tokens, self.router.top_k))))
    }

    fn bwd(&self, logits: &Tensor, weights: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(ids) = self.topk_ids.get() else { bail!("{OP}: backward before forward") };
        let (_, num_experts) = self.router.check(logits.dtype(), logits.shape())?;
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = logits.device() {
            return cuda::backward(device, &self.router, logits, ids, weights, grad).map(Some);
        }
        let rows = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let grad_logits = cpu::backward(
            self.router.method,
            &cpu::Chosen {
                num_experts,
                top_k: self.router.top_k,
                ids: &ids.flatten_all()?.to_vec1()?,
                weights: &rows(weights)?,
            },
            &rows(logits)?,
            &rows(grad)?,
        );
        let grad_logits = Tensor::from_vec(grad_logits, logits.shape(), logits.device())?;
        Ok(Some(grad_logits.to_dtype(logits.dtype())?))
    }
}
