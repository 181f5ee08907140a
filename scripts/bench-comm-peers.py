#!/usr/bin/env python3
"""Times the collectives of torch's NCCL that dispatch and combine are made of, one process for each device, from CUDA graphs.

    scripts/bench-comm-peers.py [--devices 2] [--calls 10] [--replays 50]

Rows are bfloat16 of hidden_size; an all-to-all and an all-gather bring every token to every rank, a reduce-scatter brings sums home.
Prints JSON: microseconds of a call on the slowest rank, the median of the replays.
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SHAPES = [("gpt_oss", 2880, (1, 32, 512, 4096)), ("deepseek_v3", 7168, (1, 128, 4096))]


def timed(call, calls, replays):
    """Microseconds of a call, of each replay."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    samples = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / calls)
    return samples


def work(rank, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK=str(rank), WORLD_SIZE=str(args.devices))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    rows = []
    for profile, hidden, sizes in SHAPES:
        for tokens in sizes:
            own = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
            every = torch.empty(tokens * args.devices, hidden, device="cuda", dtype=torch.bfloat16)
            other = torch.randn_like(every)
            sums = torch.empty_like(own)
            calls = {
                "all_to_all": lambda: dist.all_to_all_single(every, other),
                "all_gather": lambda: dist.all_gather_into_tensor(every, own),
                "reduce_scatter": lambda: dist.reduce_scatter_tensor(sums, other),
            }
            row = {"profile": profile, "tokens_per_rank": tokens}
            for name, call in calls.items():
                samples = torch.tensor(timed(call, args.calls, args.replays), device="cuda")
                dist.all_reduce(samples, op=dist.ReduceOp.MAX)
                row[name + "_us"] = round(samples.median().item(), 2)
            rows.append(row)
    if rank == 0:
        print(json.dumps({"torch": torch.__version__, "nccl": torch.cuda.nccl.version(), "device": torch.cuda.get_device_name(), "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--replays", type=int, default=50)
    args = parser.parse_args()
    mp.spawn(work, (args,), args.devices)
