#!/usr/bin/env python3
"""make gpu-bench: what tprpc costs between this machine's GPUs, beside bare driver calls and beside PyTorch.

Every figure is the median of several rounds. A round runs everything once, ours next to what it is compared with, and a
ratio is the median of the rounds' ratios, as in bench.py. Needs a build by gcc, Python, and PyTorch for the peers;
installs nothing and asks no network. What cannot be measured is a row that says why. Prints a table; writes it with all
single values to tools/results/.

usage: tools/gpu-bench.py [--quick] [--rounds N] [--build DIR] [--results DIR] [--only WORD] [--strict]
                          [--charts FILE] [--readme [FILE]]
  --quick          two rounds without the largest tensors, in about 90 s; without it, at most 6 minutes
  --only WORD      the rows whose name contains WORD
  --strict         exit status 1 when a bound is missed (it is 1 anyway when something of ours could not be measured)
  --charts FILE    measures nothing: draws the charts of a run, from its JSON, beside it
  --readme [FILE]  measures nothing: the newest whole run in the results' folder becomes the one that the README (or
                   FILE) quotes, between its two marker comments, with its charts and its JSON beside them
"""
import argparse
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import bench
import bench_report
import bench_take as take
from bench import Row, size_name
from bench_take import Failed, ROOT

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TRIP_SIZES = [8, 64 * KIB, MIB, 16 * MIB, 256 * MIB, GIB]
TENSOR_SIZES = [64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB]
LARGE = 256 * MIB
BATCH, BATCH_SIZE = 1000, 4 * KIB
BEGIN = time.monotonic()
LIMIT_S = {False: 330, True: 85}     # from then on, after which nothing new begins; by --quick
ONE_LIMIT_S = 25                     # of one measurement
PEERS = {"rpc": "PyTorch RPC", "nccl": "NCCL"}
BASIC = ("--channel", "cuda_basic,basic")        # as where GPUs cannot reach each other
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}      # no NVLink multicast


# ---- the machine ----------------------------------------------------------------------------------------------------

def said_by(*command):
    """A command's output, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(build):
    """What tprpc-info and the driver's tool tell."""
    command = [os.path.join(build, "tprpc-info"), "--json"]
    info = take.parse_json(take.run(command), command[0])
    if not info["gpus"]:
        raise Failed(info["gpus_reason"])
    names = [gpu["name"] for gpu in info["gpus"]]
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    kind = f"{len(names)}-" + names[0].replace("NVIDIA ", "").replace(" ", "-").lower()
    return {"host_kind": "stand-in" if info["stand_in"] else kind, "gpus": names, "peers": [gpu["peers"] for gpu in
            info["gpus"]], "driver": driver and driver.splitlines()[0], "topology": said_by("nvidia-smi", "topo", "-m"),
            "cpu": take.cpu_model(), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release(),
            "load": os.getloadavg()[0], "stand_in": info["stand_in"]}


# ---- tprpc-perf -----------------------------------------------------------------------------------------------------

class Perf:
    """Runs of tprpc-perf: one run gives figures for several sizes, as "SIZE", and what more its lines have."""

    def __init__(self, build, quick, small):
        self.build, self.quick, self.small = build, quick, small

    def sizes(self, sizes):
        most = MIB if self.small else LARGE if self.quick else GIB
        return [size for size in sizes if size <= most] or [most]

    def __call__(self, key, sizes, *options, more=()):
        """A measurement. more: keys whose figures come as "SIZE KEY"."""
        wanted = self.sizes(sizes)
        command = [os.path.join(self.build, "tprpc-perf"), "--json", *options, "--size", ",".join(map(str, wanted))]
        if self.small:
            command += ["--iters", "10"]

        def measure():
            lines, why = lines_of(command)
            figures = {}
            for line in lines:
                result = take.parse_json(line, command[0])
                for name, suffix in [(key, "")] + [(other, " " + other) for other in more]:
                    if result.get(name) is not None:
                        figures[f"{result['size']}{suffix}"] = result[name]
            return figures, why
        return measure, wanted


def lines_of(command):
    """The lines that a command printed, and why there are no more, or None. It may have failed half-way."""
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=dict(os.environ, **QUIET)) as process:
        try:
            out, err = process.communicate(timeout=ONE_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return whole_lines(out), f"{' '.join(command)}: no end after {time.monotonic() - begin:.0f} s"
    if process.returncode == 0:
        return whole_lines(out), None
    said = (err.strip().splitlines() or [f"exit status {process.returncode}"])[0]
    return whole_lines(out), f"{' '.join(command)}: {said}"


def whole_lines(text):
    return [line for line in (text or "").split("\n")[:-1] if line]


# ---- PyTorch --------------------------------------------------------------------------------------------------------

class Peers:
    """Two processes that stay for the whole run and are asked once a round."""

    def __init__(self, kind, quick):
        self.kind, self.processes, self.said, self.read, port = kind, [], [], b"", take.free_port()
        options = ["--quick"] if quick else []
        for rank in range(2):
            self.said.append(tempfile.TemporaryFile("w+", errors="replace"))
            self.processes.append(subprocess.Popen(
                [sys.executable, os.path.join(ROOT, "tools", "gpu_peers.py"), kind, str(rank), str(port), *options],
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=self.said[rank], text=True,
                env=dict(os.environ, **QUIET)))

    def line(self, end):
        """The next line of rank 0, or why there is none. It comes by the descriptor, which select knows."""
        out = self.processes[0].stdout.fileno()
        while b"\n" not in self.read:
            if not select.select([out], [], [], 0.2)[0]:
                if time.monotonic() > end:
                    raise Failed(self.why("no answer in time"))
                if any(process.poll() for process in self.processes):
                    raise Failed(self.why("it ended"))
                continue
            some = os.read(out, 65536)
            if not some:
                raise Failed(self.why("it ended"))
            self.read += some
        line, _, self.read = self.read.partition(b"\n")
        return json.loads(line)

    def answer(self):
        """The figures of rank 0, and why there are no more, or None."""
        figures, end = {}, time.monotonic() + 2 * ONE_LIMIT_S
        try:
            while True:
                line = self.line(end)
                if "end" in line:
                    return figures, line["end"] and f"{PEERS[self.kind]}: {line['end'][:200]}"
                figures.update(line)
        except Failed as failure:
            return figures, str(failure)

    def ask(self):
        try:
            self.processes[0].stdin.write("go\n")
            self.processes[0].stdin.flush()
        except OSError:
            return {}, self.why("it ended")
        return self.answer()

    def why(self, what):
        """What happened, and what the process said last that ended by itself."""
        time.sleep(1)                # the other one may be about to say more
        said = []
        for rank, process in enumerate(self.processes):
            code = process.poll()
            self.said[rank].seek(0)
            lines = [line.strip() for line in self.said[rank].read().splitlines() if line.strip()]
            errors = [line for line in lines if "Error" in line or "error" in line] or lines
            if code or (errors and code is None):
                ended = f", exit status {code}" if code else ""
                said.append(f"rank {rank}{ended}: {(errors or ['nothing'])[-1][:200]}")
        self.stop()
        return f"{PEERS[self.kind]}: {what}; {'; '.join(said) or 'it said nothing'}"

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


# ---- measurements ---------------------------------------------------------------------------------------------------
#
# By name: what measures it, and which figures it gives. "NAME FIGURE" is then a source for the rows, as in bench.py.

def between(a, b):
    return ("--device", a, "--peer-device", b)


def pair_measurements(perf, name, pair):
    """Between GPUs that may reach each other, ours next to the bare calls."""
    single = "one" in name
    inside = ("--in-process",) if single else ()
    found = {
        f"bw {name}": perf("bandwidth_gbps", TENSOR_SIZES, "--test", "bw", *pair, *inside),
        f"bare bw {name}": perf("bandwidth_gbps", TENSOR_SIZES, "--test", "raw", "--transport", "cuda-peer", *pair,
                                *inside),
        f"rtt {name}": perf("p50_us", [8] if single else TRIP_SIZES, "--test", "rtt", *pair, *inside),
    }
    if not single:
        found[f"bare rtt {name}"] = perf("p50_us", TRIP_SIZES, "--test", "raw", "--transport", "cuda-ordered", *pair)
    return found


def two_measurements(perf, pair):
    """Between two GPUs."""
    batch = ("--count", str(BATCH), "--iters", "200")
    unlent = ("--register", "no")
    return {
        **pair_measurements(perf, "0-1", pair),
        "rtt idle 0-1": perf("p50_us", [8], "--test", "rtt", "--ordered", "no", *pair),
        "bare rtt idle 0-1": perf("p50_us", [8], "--test", "raw", "--transport", "cuda-idle", *pair),
        "rpc 0-1": perf("p50_us", [8], "--test", "rpc", *pair),
        "bw outbox 0-1": perf("bandwidth_gbps", [MIB, LARGE], "--test", "bw", *unlent, *pair),
        "rtt outbox 0-1": perf("p50_us", [8], "--test", "rtt", *unlent, *pair),
        "batch bw 0-1": perf("mean_us", [BATCH_SIZE], "--test", "bw", *batch, *pair),
        "batch rtt 0-1": perf("p50_us", [BATCH_SIZE], "--test", "rtt", *batch, *pair),
        "bare batch 0-1": perf("p50_us", [BATCH_SIZE], "--test", "raw", "--transport", "cuda-gather", *batch, *pair),
        "cpu 0-1": perf("mean_us", [MIB], "--test", "bw", "--spin", "never", *pair, more=("cpu_us", "peer_cpu_us")),
        "busy 0-1": perf("mean_us", [GIB], "--test", "bw", "--spin", "never", *pair, more=("cpu_us", "peer_cpu_us")),
        "bw basic 0-1": perf("bandwidth_gbps", [MIB, 16 * MIB, LARGE], "--test", "bw", *BASIC, *pair),
        "bare pinned 0-1": perf("bandwidth_gbps", [MIB, 16 * MIB, LARGE], "--test", "raw", "--transport", "cuda-pinned",
                                *pair),
        "rtt basic 0-1": perf("p50_us", [8], "--test", "rtt", *BASIC, *pair),
    }


def one_measurements(perf):
    """With one GPU."""
    found = {
        **pair_measurements(perf, "0-0 one", between("cuda:0", "cuda:0")),
        "bw 0-0": perf("bandwidth_gbps", [LARGE], "--test", "bw", *between("cuda:0", "cuda:0")),
        "bare bw 0-0": perf("bandwidth_gbps", [LARGE], "--test", "raw", "--transport", "cuda-peer",
                            *between("cuda:0", "cuda:0")),
        "rtt 0-0": perf("p50_us", [8], "--test", "rtt", "--iters", "300", *between("cuda:0", "cuda:0")),
        "bare rtt 0-0": perf("p50_us", [8], "--test", "raw", "--transport", "cuda-ordered", "--iters", "300",
                             *between("cuda:0", "cuda:0")),
    }
    for name, pair in (("host-0", between("pinned", "cuda:0")), ("0-host", between("cuda:0", "pinned"))):
        found[f"bw {name}"] = perf("bandwidth_gbps", [MIB, 16 * MIB, LARGE], "--test", "bw", *pair)
        found[f"bare pinned {name}"] = perf("bandwidth_gbps", [MIB, 16 * MIB, LARGE], "--test", "raw", "--transport",
                                            "cuda-pinned", *pair)
    found["bw any-0"] = perf("bandwidth_gbps", [LARGE], "--test", "bw", *between("cpu", "cuda:0"))
    found["bw 0-any"] = perf("bandwidth_gbps", [LARGE], "--test", "bw", *between("cuda:0", "cpu"))
    found["rtt host-0"] = perf("p50_us", [8], "--test", "rtt", *between("pinned", "cuda:0"))
    return found


# ---- the rows -------------------------------------------------------------------------------------------------------

def peers_of(what):
    return [(label, f"{kind} {what}") for kind, label in PEERS.items()]


def at_most(number):
    return [("bound", float(number), "<=", 1.0)]


def two_rows(large):
    bare, pinned = ("bare peer copy", f"bare bw 0-1 {large}"), ("bare pinned copy", f"bare pinned 0-1 {large}")
    ordered, idle = ("bare calls", "bare rtt 0-1 8"), ("bare calls", "bare rtt idle 0-1 8")
    gather = ("bare kernel", f"bare batch 0-1 {BATCH_SIZE}")
    name = size_name(large)
    rows = [
        Row("8 B, 0 to 1 and back, ordered", "us", "rtt 0-1 8", ordered, peers_of("rtt 8"), [(*ordered, "<=", 1.15)]),
        Row("8 B, 0 to 1 and back, streams idle", "us", "rtt idle 0-1 8", idle, (), [(*idle, "<=", 1.5)]),
        Row("8 B, call and reply, 0 to 1", "us", "rpc 0-1 8", ordered, peers_of("rtt 8")),
        Row("8 B, 0 to 1 and back, through the outbox", "us", "rtt outbox 0-1 8", ordered),
        Row("8 B, 0 to 1 and back, no peer access", "us", "rtt basic 0-1 8", ordered),
        Row(f"{name}, 0 to 1", "GB/s", f"bw 0-1 {large}", bare, peers_of(f"bw {large}"), [(*bare, ">=", 0.97)]),
        Row(f"{name}, 0 to 1, through the outbox", "GB/s", f"bw outbox 0-1 {large}", bare, (), [(*bare, ">=", 0.9)]),
        Row(f"{name}, 0 to 1, without peer access", "GB/s", f"bw basic 0-1 {large}", pinned, (),
            [(*pinned, ">=", 0.9)]),
        Row("1,000 x 4 KiB, 0 to 1, one after another", "us", f"batch bw 0-1 {BATCH_SIZE}", gather, peers_of("batch"),
            at_most(60)),
        Row("1,000 x 4 KiB, 0 to 1 and back", "us", f"batch rtt 0-1 {BATCH_SIZE}", gather, (), at_most(120)),
    ]
    for side, key in (("sender", "cpu_us"), ("receiver", "peer_cpu_us")):
        rows.append(Row(f"CPU time of a transfer of 1 MiB, {side}", "us", f"cpu 0-1 {MIB} {key}", None, (),
                        at_most(12)))
    return rows


def busy_rows(largest):
    """The share of its time that a core is busy while the largest tensors move."""
    return [Row(f"a core busy while {size_name(largest)} tensors move, {side}", "", f"busy 0-1 {key}", None, (),
                at_most(0.1)) for side, key in (("sender", "cpu_us"), ("receiver", "peer_cpu_us"))]


def one_rows(large):
    name = size_name(large)
    copy, other = ("bare copy", f"bare bw 0-0 one {large}"), ("bare copy", f"bare bw 0-0 {large}")
    calls = ("bare calls", "bare rtt 0-0 8")
    rows = [
        Row(f"{name}, 0 to 0, one process", "GB/s", f"bw 0-0 one {large}", copy, (), [(*copy, ">=", 0.95)]),
        Row("8 B, 0 to 0 and back, one process", "us", "rtt 0-0 one 8"),
        Row(f"{name}, 0 to 0, two processes", "GB/s", f"bw 0-0 {large}", other),
        Row("8 B, 0 to 0 and back, two processes", "us", "rtt 0-0 8", calls),
    ]
    for direction, name_of in (("pinned host memory to 0", "host-0"), ("0 to pinned host memory", "0-host")):
        pinned = ("bare pinned copy", f"bare pinned {name_of} {large}")
        rows.append(Row(f"{name}, {direction}", "GB/s", f"bw {name_of} {large}", pinned, (), [(*pinned, ">=", 0.9)]))
    return rows + [
        Row(f"{name}, other host memory to 0", "GB/s", f"bw any-0 {large}"),
        Row(f"{name}, 0 to other host memory", "GB/s", f"bw 0-any {large}"),
        Row("8 B, pinned host memory to 0 and back", "us", "rtt host-0 8"),
    ]


def curve_rows(sizes_of, two):
    rows = []
    for size in sizes_of(TRIP_SIZES) if two else []:
        rows.append(Row(f"there and back, 0 to 1, {size_name(size)}", "us", f"rtt 0-1 {size}",
                        ("bare calls", f"bare rtt 0-1 {size}"), peers_of(f"rtt {size}")))
    for size in sizes_of(TENSOR_SIZES):
        for name, label in (("0-1", "0 to 1"), ("0-0 one", "0 to 0, one process"))[0 if two else 1:]:
            rows.append(Row(f"one way, {label}, {size_name(size)}", "GB/s", f"bw {name} {size}",
                            ("bare copy", f"bare bw {name} {size}"), peers_of(f"bw {size}") if name == "0-1" else ()))
    return rows


def charts_of(values, sizes_of):
    """By chart, its curves: a label, and points of a size and a figure."""
    def curve(label, name, sizes):
        sources = [(size, f"{name} {size}") for size in sizes_of(sizes)]
        return {"label": label, "points": [[size, statistics.median(values[source])] for size, source in sources
                                           if values.get(source)]}
    trips = [("tprpc", "rtt 0-1"), ("bare driver calls", "bare rtt 0-1"), ("PyTorch RPC", "rpc rtt"),
             ("NCCL", "nccl rtt")]
    copies = [("tprpc", "bw 0-1"), ("bare peer copy", "bare bw 0-1"), ("tprpc, outbox", "bw outbox 0-1"),
              ("tprpc, no peer access", "bw basic 0-1"), ("bare pinned copy", "bare pinned 0-1"),
              ("PyTorch RPC", "rpc bw"), ("NCCL", "nccl bw")]
    return {"gpu-rtt": [curve(label, name, TRIP_SIZES) for label, name in trips],
            "gpu-bandwidth": [curve(label, name, TENSOR_SIZES) for label, name in copies]}


# ---- running --------------------------------------------------------------------------------------------------------

class Late(Exception):
    """The time for the whole run is over."""


def one_round(available, figures, failures, deadline, number):
    """One figure for each source; why one is missing goes to `failures`, by measurement."""
    for name, measure in available.items():
        if name in failures:
            continue
        if time.monotonic() > deadline:
            raise Late(name)
        bench.progress(f"round {number}: {name}")
        try:
            found, why = measure()
        except Failed as failure:
            found, why = {}, str(failure)
        figures.update({f"{name} {key}": value for key, value in found.items()})
        if why:
            failures[name] = why
    bench.progress("")


def measure_all(available, rounds, limit_s):
    """Values by source, why measurements failed, and how many rounds there were."""
    values, failures, done, longest = {}, {}, 0, 0.0
    for number in range(1, rounds + 1):
        started, figures = time.monotonic(), {}
        if done and started - BEGIN + longest > limit_s:
            break
        try:
            one_round(available, figures, failures, BEGIN + limit_s, number)
        except Late as late:
            if done:
                break                # what is left of this round would have nothing beside it
            failures[str(late)] = f"{late}, and what comes after it: the time for the whole run is over"
        longest = max(longest, time.monotonic() - started)
        done += 1
        for source, value in figures.items():
            values.setdefault(source, []).append(value)
    return values, failures, max(done, 1)


class Sources(dict):
    """Why a source has no figures: what its measurement said. One that failed later has those of the rounds before."""

    def __init__(self, values, failures):
        super().__init__()
        self.values_of, self.why = values, failures

    def __contains__(self, source):
        return not self.values_of.get(source)

    def __missing__(self, source):
        names = [name for name in self.why if source.startswith(name + " ")]
        return self.why[max(names, key=len)] if names else f"{source}: not measured"


def judged(rows, values, failures, rounds):
    figures = bench.Figures(values, Sources(values, failures), rounds)
    return [bench.judge(row, figures) for row in rows]


def add_shares(values, size):
    """CPU time of a transfer by the time that it takes."""
    for key in ("cpu_us", "peer_cpu_us"):
        source = values.get(f"busy 0-1 {size} {key}")
        if source:
            values[f"busy 0-1 {key}"] = [a / b for a, b in zip(source, values[f"busy 0-1 {size}"])]


# ---- main -----------------------------------------------------------------------------------------------------------

def print_head(here, rounds):
    print(f"{len(here['gpus'])} x {here['gpus'][0]}, driver {here['driver'] or '?'}; {here['cores']} cores, "
          f"{here['cpu']}, Linux {here['kernel']}; load before: {here['load']:.2f}; at most {rounds} rounds")
    if here["stand_in"]:
        print("The driver is the tests' stand-in: these are no figures of a GPU, and are not to be quoted.")
    print(flush=True)


def run(options):
    try:
        here = machine(options.build)
    except Failed as failure:
        print(f"tools/gpu-bench.py: no GPU to measure: {failure}", file=sys.stderr)
        return 1
    rounds = options.rounds or (2 if options.quick else 5)
    print_head(here, rounds)
    two, left_out = len(here["gpus"]) > 1, []
    perf = Perf(options.build, options.quick, here["stand_in"])
    large, largest = perf.sizes([LARGE])[0], perf.sizes([GIB, LARGE])[0]
    rows = two_rows(large) + busy_rows(largest) if two else []
    if not two:
        left_out = [row.name for row in two_rows(large)]
    rows, curves = rows + one_rows(large), curve_rows(perf.sizes, two)
    available = {**(two_measurements(perf, between("cuda:0", "cuda:1")) if two else {}), **one_measurements(perf)}
    measures = {name: measure for name, (measure, _) in available.items()}
    rows, curves = ([row for row in some if options.only in row.name] for some in (rows, curves))
    if options.only:
        wanted = {source for row in rows + curves for side in bench.sources_of(row) for source in bench.names_of(side)}
        measures = {name: measure for name, measure in measures.items()
                    if any(source.startswith(name + " ") for source in wanted)}
    peers = {}
    try:
        if two and not (options.only or here["stand_in"]):
            for kind in PEERS:
                peers[kind] = Peers(kind, options.quick)
                why = peers[kind].answer()[1]    # they have found each other, so that this disturbs no measurement
                measures[kind] = (lambda why=why: ({}, why)) if why else peers[kind].ask
        values, failures, done = measure_all(measures, rounds, LIMIT_S[options.quick])
    finally:
        for peer in peers.values():
            peer.stop()
    add_shares(values, largest)
    report = {**here, "rounds": done, "rows": judged(rows, values, failures, done),
              "curves": judged(curves, values, failures, done), "failures": failures, "left_out": left_out,
              "values": values, "charts": charts_of(values, perf.sizes)}
    return finish(options, report)


def finish(options, report):
    bench_report.print_table(report)
    for name in report["left_out"]:
        print(f"left out: {name}: needs two GPUs")
    for text in dict.fromkeys(report["failures"].values()):
        print("not measured:", text)
    whole = not (options.only or options.quick or report["stand_in"])
    path = bench.write_results(options.results, report, "gpu-bench-" + ("" if whole else "part-"), report["host_kind"])
    print(f"\nmedians of {report['rounds']} rounds; {os.path.relpath(path)}")
    if shutil.which("gnuplot"):
        print(bench_report.draw(report, options.results))
    else:
        print(f"charts, where gnuplot is: tools/gpu-bench.py --charts {os.path.relpath(path)}")
    ours = [name for name in report["failures"] if name not in PEERS]
    missed = any(bound["met"] is False for result in report["rows"] for bound in result["bounds"])
    return 1 if ours or (options.strict and missed) else 0


def section(report, folder, readme):
    gpus = f"{len(report['gpus'])} {report['gpus'][0]}, driver {report['driver'] or 'unknown'}"
    host = f"{report['cpu']}, Linux {report['kernel'].split('-')[0]}"
    return (f"Measured {report['date'][:10]} on {gpus} ({host}): medians of {report['rounds']} rounds.\n\n"
            f"{bench_report.markdown_table(report)}\n\n"
            f"{bench_report.images(bench_report.GPU_CHARTS, report, folder, readme)}".rstrip())


def main():
    parser = argparse.ArgumentParser(usage="tools/gpu-bench.py [--quick] [--rounds N] [--build DIR] [--results DIR] "
                                           "[--only WORD] [--strict] [--charts FILE] [--readme [FILE]]")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--build", default=os.path.join(ROOT, "build"))
    parser.add_argument("--results", default=os.path.join(ROOT, "tools", "results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--charts")
    parser.add_argument("--readme", nargs="?", const=os.path.join(ROOT, "README.md"))
    options = parser.parse_args()
    try:
        if options.charts:
            with open(options.charts) as file:
                print(bench_report.draw(json.load(file), os.path.dirname(os.path.abspath(options.charts))))
            return 0
        if options.readme:
            print(bench_report.quote(options.results, options.readme, "gpu-bench", section))
            return 0
    except (OSError, ValueError, LookupError) as error:
        print(f"tools/gpu-bench.py: {error}", file=sys.stderr)
        return 1
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
