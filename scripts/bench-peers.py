#!/usr/bin/env python3
"""Times what others route and compute MoE layers with, beside which bench_moe's numbers stand:

    scripts/bench-peers.py [--packages DIR] [--only topk,routing,layer] [--output json]

Peers: PyTorch (top-k and softmax), OpenAI's triton_kernels (top-k, routing, and the MXFP4 layer of GPT-OSS as vLLM runs it
on Hopper) and vLLM's own routing kernels. Each is measured where it can be imported, and an error of one leaves the others
alone. Times are as bench_moe takes them: a captured CUDA graph whose calls have other logits and, for layers, other weights
in turn, events around its replay, the median; bf16 logits and hidden states; layers without their gate.

The package triton-kernels on PyPI is another project. A wheel of vLLM (0.20.2 is for PyTorch 2.11) holds what is needed
without being installed; --packages names a folder with it:

    pip download --no-deps vllm==0.20.2
    unzip vllm-0.20.2-*.whl 'vllm/third_party/triton_kernels/*' vllm/_moe_C.abi3.so
    mkdir peers && mv vllm/third_party/triton_kernels vllm/_moe_C.abi3.so peers
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

# Experts, slots for a token.
SHAPES = [(32, 4), (128, 4), (256, 8)]
# Experts, slots for a token, hidden size, intermediate size.
PROFILES = {"gpt-oss-20b": (32, 4, 2880, 2880), "gpt-oss-120b": (128, 4, 2880, 2880)}
# Calls of a graph; of layers of more than FEW tokens, as many as there are layers.
CALLS, FEW = 16, 64
LAYERS = 4
PARTS = ["topk", "routing", "layer"]


def arguments():
    first, _usage, rest = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        description=first.rstrip(":") + ".", epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = functools.partial(split, kind=int)
    parser.add_argument("--packages", metavar="DIR", help="folder with triton_kernels/ and _moe_C.abi3.so")
    parser.add_argument("--only", type=split, default=PARTS, metavar="PART,..", help="topk, routing, layer [default: all]")
    parser.add_argument("--profile", type=split, default=list(PROFILES), metavar="NAME,..", help="layers [default: all]")
    parser.add_argument("--num-tokens", type=numbers, metavar="N,..", help="[default: powers of two up to 8192]")
    parser.add_argument("--seconds", type=float, default=0.1, help="time of a row [default: 0.1]")
    parser.add_argument("--output", choices=["table", "json"], default="table")
    args = parser.parse_args()
    for name, known in [("only", PARTS), ("profile", list(PROFILES))]:
        unknown = [value for value in getattr(args, name) if value not in known]
        if unknown:
            parser.error(f"--{name}: {unknown[0]!r} is unknown, expected some of {', '.join(known)}")
    return args


def split(text, kind=str):
    return [kind(part) for part in text.split(",")]


class Bench:
    def __init__(self, args):
        self.args = args
        self.tokens = args.num_tokens or [1 << power for power in range(14)]
        self.rows = []

    def replays(self, calls, call):
        """Microseconds of a call, the median over replays of a graph of `calls` calls."""
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times, began = [], time.monotonic()
        while len(times) < 5 or (len(times) < 200 and time.monotonic() - began < self.args.seconds):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / calls)
        return statistics.median(times[2:])

    def measure(self, peer, part, case, num_tokens, calls, call):
        row = {"peer": peer, "part": part, "case": case, "num_tokens": num_tokens, "median_us": None}
        try:
            row["median_us"] = self.replays(calls, call)
        except Exception as error:  # One that fails leaves the others alone.
            row["error"] = short(error)
            torch.cuda.synchronize()
        self.rows.append(row)
        took = row.get("error") or f"{row['median_us']:.2f} us"
        print(f"{peer}, {part} {case}, {num_tokens} tokens: {took}", file=sys.stderr)


def short(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def logits_of(num_tokens, num_experts, calls=CALLS):
    """Uniform with a standard deviation of 1.5, other ones for each call."""
    uniform = torch.rand(calls, num_tokens, num_experts, device="cuda") * 2 - 1
    return (uniform * 1.5 * 3**0.5).to(torch.bfloat16)


# PyTorch


def torch_topk(logits, top_k):
    values, ids = torch.topk(logits, top_k, dim=-1)
    return torch.softmax(values.float(), dim=-1), ids


# triton_kernels


def triton_topk(logits, top_k):
    import triton_kernels.topk as module

    return getattr(module, "topk_forward", module.topk)(logits, top_k)


def triton_routing(logits, top_k):
    """What its products are told: the older version has a function for it, the newer composes it."""
    try:
        from triton_kernels.routing import routing
    except ImportError:
        pass
    else:
        return routing(logits, top_k)
    from triton_kernels.matmul_ogs import GatherIndx, RoutingData, ScatterIndx
    from triton_kernels.tensor import make_ragged_tensor_metadata
    from triton_kernels.topk import topk

    chosen = topk(logits, top_k)
    forth, back = chosen.mask_metadata.row_sorted_indx, chosen.mask_metadata.col_sorted_indx
    ragged = make_ragged_tensor_metadata(chosen.mask_metadata.col_sum, forth.shape[0])
    weights = chosen.vals.flatten()[back]
    routing = RoutingData(weights, ragged.block_sizes, logits.shape[-1], top_k, ragged)
    return routing, GatherIndx(back, forth), ScatterIndx(forth, back)


def triton_projection(num_experts, out_features, in_features):
    """MXFP4 weights in the layout that its products want on this device, their configuration and a bias."""
    import triton_kernels.matmul_ogs_details.opt_flags as opt_flags
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from triton_kernels.numerics import InFlexData
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    if torch.cuda.get_device_capability()[0] == 9:
        opt_flags.update_opt_flags_constraints({"split_k": 1})
    random = functools.partial(torch.randint, dtype=torch.uint8, device="cuda")
    values = random(0, 256, (num_experts, out_features, in_features // 2)).transpose(-2, -1)
    scales = random(118, 122, (num_experts, out_features, in_features // 32)).transpose(-2, -1)
    kind, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    values = convert_layout(wrap_torch_tensor(values, dtype=FP4), kind, **options)
    kind, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    scales = convert_layout(wrap_torch_tensor(scales), kind, **options)
    precision = PrecisionConfig(weight_scale=scales, flex_ctx=FlexCtx(rhs_data=InFlexData()))
    bias = torch.rand(num_experts, out_features, device="cuda") * 0.2 - 0.1
    return values, bias, precision


def triton_layer(weights, hidden, logits, top_k):
    import triton_kernels.swiglu
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs

    (w1, bias1, precision1), (w2, bias2, precision2) = weights
    names = ("alpha", "limit")
    try:
        specs = FnSpecs("swiglu", triton_kernels.swiglu.swiglu_fn, names, reduction_n=2)
        activation = FusedActivation(specs, (1.702, 7.0))
    except TypeError:  # An older version.
        activation = FusedActivation(FnSpecs("swiglu", triton_kernels.swiglu.swiglu_fn, names), (1.702, 7.0), 2)
    routing, gather, scatter = triton_routing(logits, top_k)
    inner = matmul_ogs(
        hidden, w1, bias1, routing, gather_indx=gather, precision_config=precision1, fused_activation=activation
    )
    inner = inner.view(-1, inner.shape[-1])
    return matmul_ogs(
        inner, w2, bias2, routing, scatter_indx=scatter, precision_config=precision2, gammas=routing.gate_scal
    )


# vLLM


def vllm_topk(logits, top_k):
    shape, device = (logits.shape[0], top_k), logits.device
    weights = torch.empty(shape, dtype=torch.float32, device=device)
    ids, places = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    torch.ops._moe_C.topk_softmax(weights, ids, places, logits, True, None)
    return weights, ids


def vllm_routing(logits, top_k, block=64):
    weights, ids = vllm_topk(logits, top_k)
    num_experts, slots = logits.shape[1], ids.numel()
    padded = slots + num_experts * (block - 1)
    padded = min(slots * block, padded) if slots < num_experts else padded
    empty = functools.partial(torch.empty, dtype=torch.int32, device=logits.device)
    order, experts, used = empty(padded), empty(-(-padded // block)), empty(1)
    torch.ops._moe_C.moe_align_block_size(ids, num_experts, block, order, experts, used, None)
    return weights, order, experts, used


def vllm_grouped(logits, top_k):
    """DeepSeek-V3: 8 groups, of which 4 are kept."""
    bias = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return torch.ops._moe_C.grouped_topk(logits, 8, 4, top_k, True, 2.5, bias, 1)


def find_peers(packages):
    """Which peers are there; says what is missing."""
    found = ["torch"]
    if packages:
        sys.path.insert(0, str(pathlib.Path(packages).resolve()))
    try:
        import triton_kernels.matmul_ogs  # noqa: F401

        found.append("triton_kernels")
    except Exception as error:
        print(f"bench-peers: no triton_kernels ({short(error)}); --help says where it is found", file=sys.stderr)
    try:
        library = pathlib.Path(packages or ".") / "_moe_C.abi3.so"
        if library.exists():
            torch.ops.load_library(str(library.resolve()))
        else:
            import vllm._moe_C  # noqa: F401
        found.append("vllm")
    except Exception as error:
        print(f"bench-peers: no kernels of vLLM ({short(error)}); --help says where they are found", file=sys.stderr)
    return found


def measure_routing(bench, peers, part):
    kernels = {
        "topk": {"torch": torch_topk, "vllm": vllm_topk, "triton_kernels": triton_topk},
        "routing": {"vllm": vllm_routing, "triton_kernels": triton_routing},
    }[part]
    tokens = bench.tokens if bench.args.num_tokens else bench.tokens + [16384, 32768]
    for num_experts, top_k in SHAPES:
        for num_tokens in tokens:
            logits = logits_of(num_tokens, num_experts)
            for peer, kernel in kernels.items():
                if peer in peers:
                    call = lambda i: kernel(logits[i], top_k)  # noqa: B023, E731
                    bench.measure(peer, part, f"{num_experts}x{top_k}", num_tokens, CALLS, call)
    if part == "topk" and "vllm" in peers:
        for num_tokens in tokens:
            logits = logits_of(num_tokens, 256)
            call = lambda i: vllm_grouped(logits[i], 8)  # noqa: B023, E731
            bench.measure("vllm", part, "256x8 DeepSeek-V3", num_tokens, CALLS, call)


def measure_layer(bench, name):
    num_experts, top_k, hidden_size, intermediate_size = PROFILES[name]
    layers = [
        (
            triton_projection(num_experts, 2 * intermediate_size, hidden_size),
            triton_projection(num_experts, hidden_size, intermediate_size),
        )
        for _ in range(LAYERS)
    ]
    for num_tokens in bench.tokens:
        calls = CALLS if num_tokens <= FEW else LAYERS
        logits = logits_of(num_tokens, num_experts, calls)
        hidden = (torch.rand(calls, num_tokens, hidden_size, device="cuda") * 2 - 1).to(torch.bfloat16)
        call = lambda i: triton_layer(layers[i % LAYERS], hidden[i], logits[i], top_k)  # noqa: B023, E731
        bench.measure("triton_kernels", "layer", name, num_tokens, calls, call)
    del layers
    torch.cuda.empty_cache()


def table(rows):
    """A line per peer and case, a column per number of tokens."""
    lines = {}
    for row in rows:
        lines.setdefault((row["part"], row["case"], row["peer"]), {})[row["num_tokens"]] = row["median_us"]
    tokens = sorted({row["num_tokens"] for row in rows})
    text = ["| part, case, peer | " + " | ".join(map(str, tokens)) + " |", "| --- |" + " ---: |" * len(tokens)]
    for place, times in lines.items():
        cells = (("fails" if times[n] is None else f"{times[n]:.4g}") if n in times else "" for n in tokens)
        text.append(f"| {', '.join(place)} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main():
    args = arguments()
    global torch
    try:
        import torch
    except ImportError:
        sys.exit("bench-peers: PyTorch is missing; run it with the Python that has it")
    if not torch.cuda.is_available():
        sys.exit("bench-peers: no CUDA device")
    torch.manual_seed(0)
    bench, peers = Bench(args), find_peers(args.packages)
    with torch.no_grad():
        for part in args.only:
            if part != "layer":
                measure_routing(bench, peers, part)
            elif "triton_kernels" in peers:
                for name in args.profile:
                    try:
                        measure_layer(bench, name)
                    except Exception as error:
                        print(f"bench-peers: no layers of {name}: {short(error)}", file=sys.stderr)
    metadata = {
        "bench": "bench-peers",
        "device_name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "peers": peers,
        "seconds": args.seconds,
    }
    if args.output == "json":
        print(json.dumps({"metadata": metadata, "rows": bench.rows}, indent=2))
    else:
        print(f"{metadata['device_name']}, PyTorch {metadata['torch']}; us of a call\n\n{table(bench.rows)}")


if __name__ == "__main__":
    main()
