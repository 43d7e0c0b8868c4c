#!/usr/bin/env python3
"""What gpu-bench.py measures of PyTorch between two GPUs: one of two processes.

usage: tools/gpu_peers.py rpc|nccl RANK PORT [--quick]

Rank 0 has cuda:0, rank 1 cuda:1. Rank 0 prints a line when both have met; then it takes a line "go" from its standard
input, runs everything once, and answers with one line of JSON, figures by name; until its standard input ends. rpc is
torch.distributed.rpc over TensorPipe with device maps; nccl is torch.distributed with the NCCL backend. Memory is
written before a trip, and after it, in the order of the current streams, as tprpc-perf's ordered trips have it.
"""
import datetime
import json
import os
import sys
import time

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TRIPS = {8: 300, 64 * KIB: 200, MIB: 100, 16 * MIB: 20, 256 * MIB: 5, GIB: 2}
ONE_WAY = {64 * KIB: 200, MIB: 200, 16 * MIB: 60, 64 * MIB: 30, 256 * MIB: 10, GIB: 4}
BATCH, BATCH_SIZE, BATCHES = 1000, 4 * KIB, 10
WINDOW = 4                               # tensors in flight, for rpc

for name, value in {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "TP_SOCKET_IFNAME": "lo",
                    "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}.items():
    os.environ[name] = value

import torch                             # noqa: E402 (its environment comes first)
import torch.distributed as dist         # noqa: E402


def empty(size, device):
    return torch.zeros(size, dtype=torch.uint8, device=device)


def sizes_of(table, quick):
    return {size: count for size, count in table.items() if not quick or size < GIB}


def timed(body, count, warm=2):
    """Seconds of each of `count` runs of `body`, which ends when its device has done everything: the median."""
    took = []
    for i in range(warm + count):
        begin = time.perf_counter()
        body()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
    return sorted(took[warm:])[count // 2]


# ---- rpc ------------------------------------------------------------------------------------------------------------

def echo(tensors):
    for tensor in tensors:
        tensor[:8].fill_(1)
    return tensors


def sink(tensors):
    return len(tensors)


def wait_all():
    torch.cuda.synchronize("cuda:1")


def rpc_round(quick):
    from torch.distributed import rpc
    figures = {}
    for size, count in sizes_of(TRIPS, quick).items():
        tensor = empty(size, "cuda:0")

        def trip(tensor=tensor):
            tensor[:8].fill_(1)
            rpc.rpc_sync("one", echo, args=([tensor],))
        figures[f"rtt {size}"] = timed(trip, count) * 1e6
    for size, count in sizes_of(ONE_WAY, quick).items():
        tensor = empty(size, "cuda:0")

        def stream(count, tensor=tensor):
            flying = []
            for _ in range(count):
                flying.append(rpc.rpc_async("one", sink, args=([tensor],)))
                if len(flying) == WINDOW:
                    flying.pop(0).wait()
            for future in flying:
                future.wait()
            rpc.rpc_sync("one", wait_all)
        stream(2)
        begin = time.perf_counter()
        stream(count)
        figures[f"bw {size}"] = size * count / (time.perf_counter() - begin) / 1e9
    batch = [empty(BATCH_SIZE, "cuda:0") for _ in range(BATCH)]
    figures["batch"] = timed(lambda: rpc.rpc_sync("one", sink, args=(batch,)), BATCHES) * 1e6
    return figures


def rpc_main(rank, port, quick):
    from torch.distributed import rpc
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=60)
    if rank == 0:
        options.set_device_map("one", {"cuda:0": "cuda:1"})
    rpc.init_rpc(("zero", "one")[rank], rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        serve(lambda: rpc_round(quick))
    rpc.shutdown()


# ---- nccl -----------------------------------------------------------------------------------------------------------
#
# Rank 1 runs the same loops, each operation turned round.

def nccl_trips(rank, quick):
    figures = {}
    device = f"cuda:{rank}"
    for size, count in sizes_of(TRIPS, quick).items():
        out, back = empty(size, device), empty(size, device)

        def trip(out=out, back=back):
            if rank == 0:
                out[:8].fill_(1)
                dist.send(out, 1)
                dist.recv(back, 1)
                back[:8].fill_(1)
            else:
                dist.recv(back, 0)
                back[:8].fill_(1)
                dist.send(out, 0)
        figures[f"rtt {size}"] = timed(trip, count) * 1e6
    return figures


def nccl_one_way(rank, quick):
    figures = {}
    device = f"cuda:{rank}"
    ready = empty(8, device)
    for size, count in sizes_of(ONE_WAY, quick).items():
        tensor = empty(size, device)

        def stream(count, tensor=tensor):
            for _ in range(count):
                (dist.send if rank == 0 else dist.recv)(tensor, 1 - rank)
            (dist.recv if rank == 0 else dist.send)(ready, 1 - rank)
            torch.cuda.synchronize()
        stream(2)
        begin = time.perf_counter()
        stream(count)
        figures[f"bw {size}"] = size * count / (time.perf_counter() - begin) / 1e9
    return figures


def nccl_batch(rank):
    tensors = [empty(BATCH_SIZE, f"cuda:{rank}") for _ in range(BATCH)]
    move = dist.isend if rank == 0 else dist.irecv

    def batch():
        for work in dist.batch_isend_irecv([dist.P2POp(move, tensor, 1 - rank) for tensor in tensors]):
            work.wait()
    return {"batch": timed(batch, BATCHES) * 1e6}


def nccl_round(rank, quick):
    return {**nccl_trips(rank, quick), **nccl_one_way(rank, quick), **nccl_batch(rank)}


def nccl_main(rank, port, quick):
    wait = datetime.timedelta(seconds=600)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=wait)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, timeout=wait)
    number = 0

    def go():
        nonlocal number
        store.set(f"round {number}", "go")
        number += 1
        return nccl_round(rank, quick)
    if rank == 0:
        serve(go)
        store.set(f"round {number}", "over")
    else:
        while store.get(f"round {number}") == b"go":
            nccl_round(rank, quick)
            number += 1
    dist.destroy_process_group()


# ---- both -----------------------------------------------------------------------------------------------------------

def serve(run):
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            print(json.dumps(run()), flush=True)


def main():
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ("rpc", "nccl"):
        sys.exit("usage: tools/gpu_peers.py rpc|nccl RANK PORT [--quick]")
    rank, port, quick = int(sys.argv[2]), int(sys.argv[3]), "--quick" in sys.argv
    (rpc_main if sys.argv[1] == "rpc" else nccl_main)(rank, port, quick)


if __name__ == "__main__":
    main()
