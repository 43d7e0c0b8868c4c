#!/usr/bin/env python3
"""make bench: what tprpc costs on this machine, beside the medium itself and beside its peers (UCX, ZeroMQ, nng).

Every figure is the median of several rounds. A round runs everything once, ours next to what it is compared with, and a
ratio is the median of the rounds' ratios: a virtual machine's cores move under it (the same cache line took 0.10 and
0.45 us there and back within a minute), so what counts is what was measured side by side. Prints a table; writes it
with all single values, and charts, to tools/results/. ZeroMQ and nng cannot spin: where they stand beside what spins,
that is part of their figure.

usage: tools/bench.py [--rounds N] [--build DIR] [--results DIR] [--only WORD] [--strict] [--readme [FILE]]
  --only WORD      the rows whose name contains WORD; no charts
  --strict         exit status 1 when a bound is missed (it is 1 anyway when something could not be measured)
  --readme [FILE]  measures nothing: the newest whole run in the results' folder becomes the one that the README (or
                   FILE) quotes, between its two marker comments, with its charts and its JSON beside them
"""
import argparse
import collections
import datetime
import json
import os
import platform
import statistics
import sys
import time

import bench_report
import bench_take as take
from bench_take import Failed, ROOT

KIB, MIB = 1 << 10, 1 << 20
LARGE = 64 * MIB
TRIP_SIZES = [8, 64, 512, 4 * KIB, 16 * KIB, 64 * KIB]
TENSOR_SIZES = [64 * KIB, MIB, 16 * MIB, LARGE, 1024 * MIB]
PEER_TENSOR_SIZES = TENSOR_SIZES[:-1]            # ZeroMQ and nng take seconds for a GiB
PIPES = [1, 64, 1000, 4096]
CHANNELS = {"shm": ["bulk", "cma", "basic"], "tcp": ["mpt", "basic"]}      # those of a build, in this order
PEERS = ["zmq", "nng"]
LABELS = {"zmq": "ZeroMQ", "nng": "nng", "shm": "UCX posix", "tcp": "UCX tcp"}
UCX = {"shm": "posix,self", "tcp": "tcp,self"}
LOCAL = {"shm": "ipc", "tcp": "tcp"}             # what ZeroMQ and nng have for a transport of ours
COPIES = ["memcpy", "nontemporal", "readv", "readv2"]


def size_name(size):
    for unit, name in ((1024 * MIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


# ---- measurements ---------------------------------------------------------------------------------------------------
#
# Each is taken once a round and gives one figure or several.

def tensor_iters(size):
    """How many tensors are measured: 2 GiB of them at 64 MiB, where the bounds are, 1 GiB for the other points."""
    return max(2, min(16384, (2048 if size == LARGE else 1024) * MIB // size))


def trip_iters(transport, size, spin="always"):
    """Round trips: a fraction of a second of them, most at 64 B, where the bounds are."""
    if spin == "never":
        return 10000
    return (200000 if transport == "shm" else 50000) // (1 if size == 64 else 4 if size < 16 * KIB else 20)


def trip_measurements(build):
    """Round trips, by size: what spins beside what spins; what sleeps at 64 B."""
    def ours(test, transport, size, spin):
        return lambda: take.perf(build, "p50_us", "--test", test, "--transport", transport, "--size", str(size),
                                 "--spin", spin, "--iters", str(trip_iters(transport, size, spin)), expect=transport)

    found = {"cache line": ours("raw", "shm", 64, "always"), "rpc shm": ours("rpc", "shm", 64, "always")}
    for size in TRIP_SIZES:
        found[f"raw tcp {size}"] = ours("raw", "tcp", size, "always")
        for transport in ("shm", "tcp"):
            found[f"rtt {transport} {size}"] = ours("rtt", transport, size, "always")
            found[f"ucx rtt {transport} {size}"] = lambda transport=transport, size=size: take.ucx_round_trip_us(
                UCX[transport], size, trip_iters(transport, size))
            for peer in PEERS:
                found[f"{peer} rtt {transport} {size}"] = lambda peer=peer, transport=transport, size=size: take.peer(
                    build, peer, "p50_us", "rtt", LOCAL[transport], size, 3000)
    found["raw tcp sleeping"] = ours("raw", "tcp", 64, "never")
    found["rtt tcp sleeping"] = ours("rtt", "tcp", 64, "never")
    return found


def rate_measurements(build):
    found = {}
    for transport in ("shm", "tcp"):
        iters = 5000000 if transport == "shm" else 1000000
        found[f"ucx rate {transport}"] = lambda transport=transport, iters=iters: take.ucx_rate_mps(
            UCX[transport], 64, iters)
        found[f"rate {transport}"] = lambda transport=transport, iters=iters: take.perf(
            build, "rate_mps", "--test", "rate", "--transport", transport, "--size", "64", "--iters", str(iters),
            "--spin", "always", expect=transport)
        for peer, few in (("zmq", 500000), ("nng", 30000)):
            found[f"{peer} rate {transport}"] = lambda peer=peer, transport=transport, few=few: take.peer(
                build, peer, "rate_mps", "rate", LOCAL[transport], 64, few)
    return found


def tensor_measurements(build, channels):
    """Bandwidth, by size: ours over each channel, copies and bare sockets, peers."""
    def ours(test, transport, size, *more):
        return lambda: take.perf(build, "bandwidth_gbps", "--test", test, "--transport", transport, "--size", str(size),
                                 "--iters", str(tensor_iters(size)), "--spin", "always", *more, expect=transport)

    found = {}
    for size in TENSOR_SIZES:
        for copy in COPIES:
            found[f"{copy} {size}"] = ours("raw", copy, size)
        if "xth" in channels:
            found[f"bw xth {size}"] = ours("bw", "shm", size, "--channel", "xth", "--in-process")
        for transport, names in CHANNELS.items():
            for channel in names:
                if channel in channels:
                    lanes = ("--lanes", "4") if channel == "mpt" else ()      # it is not used without
                    found[f"bw {transport} {channel} {size}"] = ours("bw", transport, size, "--channel", channel, *lanes)
            if size == LARGE:
                found[f"bw {transport}"] = ours("bw", transport, size)
            found[f"ucx bw {transport} {size}"] = lambda transport=transport, size=size: take.ucx_bandwidth_gbps(
                UCX[transport], size, tensor_iters(size))
            for peer in PEERS if size in PEER_TENSOR_SIZES else []:
                found[f"{peer} bw {transport} {size}"] = lambda peer=peer, transport=transport, size=size: take.peer(
                    build, peer, "bandwidth_gbps", "bw", LOCAL[transport], size, max(4, tensor_iters(size) // 4))
        if size >= MIB:
            found[f"raw tcp bw {size}"] = ours("raw", "tcp", size)
    found["ucx cma"] = lambda: take.ucx_bandwidth_gbps("posix,cma,self", LARGE, tensor_iters(LARGE))
    return found


def other_measurements(build):
    found = {}
    for transport in ("tcp", "shm"):
        found[f"frame {transport}"] = lambda transport=transport: take.perf(
            build, "p999_us", "--test", "frame", "--transport", transport, "--spin", "always", expect=transport)
        found[f"loaded {transport}"] = lambda transport=transport: take.loaded(build, transport)
        for count in PIPES:
            found[f"pipes {transport} {count}"] = lambda transport=transport, count=count: take.perf(
                build, ["bytes_per_pipe", "fds_per_pipe", "connect_us", "hot_us", "alone_us", "cold_us"], "--test",
                "pipes", "--transport", transport, "--count", str(count), "--spin", "always", expect=transport)
    found["idle"] = lambda: take.idle(build)
    found["timers"] = lambda: take.timers(build)
    found["agent"] = lambda: take.agent(build)
    found["compile"] = take.compile_s
    return found


def measurements(build, channels):
    return {**trip_measurements(build), **rate_measurements(build), **tensor_measurements(build, channels),
            **other_measurements(build)}


# ---- the rows -------------------------------------------------------------------------------------------------------
#
# A figure comes from a source: a measurement's name; a name and an index, where it gives several; a number; or a list
# of names, of which the best counts in each round. A row puts ours beside a limit and the best of some peers, each
# ("label", source), and has bounds ("label", source, "<=" or ">=", factor).

Row = collections.namedtuple("Row", "name unit ours limit peers bounds", defaults=(None, (), ()))
MORE_IS_BETTER = ("GB/s", "million")


def at_most(number):
    return (("bound", float(number), "<=", 1.0),)


def peers_of(test, transport, size=None):
    end = "" if size is None else f" {size}"
    asleep = ", asleep" if test == "rtt" else ""
    names = PEERS if test != "bw" or size in PEER_TENSOR_SIZES else []
    return [(LABELS[transport], f"ucx {test} {transport}{end}")] + \
           [(LABELS[peer] + asleep, f"{peer} {test} {transport}{end}") for peer in names]


def trip_rows():
    shm, tcp = peers_of("rtt", "shm", 64), peers_of("rtt", "tcp", 64)
    line, bare = ("cache line", "cache line"), ("bare socket", "raw tcp 64")
    asleep = ("bare socket", "raw tcp sleeping")
    return [
        Row("64 B there and back, shm", "us", "rtt shm 64", line, shm, [(*shm[0], "<=", 0.7)]),
        Row("64 B call and reply, shm", "us", "rpc shm", line, shm, [(*shm[0], "<=", 1.0)]),
        Row("64 B there and back, tcp, spinning", "us", "rtt tcp 64", bare, tcp, [(*bare, "<=", 1.1)]),
        Row("64 B there and back, tcp, sleeping", "us", "rtt tcp sleeping", asleep, tcp[1:], [(*asleep, "<=", 1.1)]),
        Row("64 B messages a second, shm", "million", "rate shm", None, peers_of("rate", "shm"),
            [("bound", 10.0, ">=", 1.0)]),
        Row("64 B messages a second, tcp", "million", "rate tcp", None, peers_of("rate", "tcp")),
    ]


def tensor_rows(channels):
    size = LARGE
    readv, readv2 = ("process_vm_readv", f"readv {size}"), ("readv, 2 threads", f"readv2 {size}")
    copy = ("best copy", [f"memcpy {size}", f"nontemporal {size}"])
    bare, shm, tcp = ("bare socket", f"raw tcp bw {size}"), peers_of("bw", "shm", size), peers_of("bw", "tcp", size)
    shm.insert(1, ("UCX cma", "ucx cma"))
    two_cores = len(os.sched_getaffinity(0)) > 1
    shown = {                        # the limit, the peers, and the bounds of each channel that may be there
        ("xth", f"bw xth {size}"): (copy, shm, [(*copy, ">=", 0.95)]),
        ("bulk", f"bw shm bulk {size}"): (readv2, shm, [(*readv, ">=", 1.4)] if two_cores else []),
        ("cma", f"bw shm cma {size}"): (readv, shm, [(*readv, ">=", 0.97)]),
        ("basic", f"bw shm basic {size}"): (copy, shm, []),
        ("mpt", f"bw tcp mpt {size}"): (bare, tcp, []),
    }
    rows = [Row("64 MiB tensors, shm, as chosen", "GB/s", "bw shm", copy, shm),
            Row("64 MiB tensors, tcp, as chosen", "GB/s", "bw tcp", bare, tcp,
                [(*bare, ">=", 0.9), (*tcp[0], ">=", 1.0)])]
    rows += [Row(f"64 MiB tensors, channel {channel}", "GB/s", name, *rest)
             for (channel, name), rest in shown.items() if channel in channels]
    return rows


def loaded_rows():
    rows = []
    for transport in ("shm", "tcp"):
        def source(index, name=f"loaded {transport}"):
            return (name, index)
        rows += [
            Row(f"64 B calls beside tensors, p99, {transport}", "us", source(0), ("calls alone", source(1)), (),
                [("3 x alone, 10 us", source(5), "<=", 1.0)]),
            Row(f"tensors beside the calls, {transport}", "GB/s", source(2), ("tensors alone", source(3)), (),
                [("tensors alone", source(3), ">=", 0.75)]),
            Row(f"calls issued late, of 10,000, {transport}", "", source(4)),
        ]
    return rows


def other_rows():
    return [
        Row("poll of a 1 ms budget, p99.9, tcp", "us", "frame tcp", None, (), at_most(1500)),
        Row("poll of a 1 ms budget, p99.9, shm", "us", "frame shm", None, (), at_most(1500)),
        Row("two idle agents, 10 s, CPU", "ms", ("idle", 0), None, (), at_most(2)),
        Row("two idle agents, 10 s, wake-ups", "", ("idle", 1), None, (), at_most(10)),
        Row("two idle agents, threaded: CPU", "ms", ("idle", 2), None, (), at_most(2)),
        Row("two idle agents, threaded: wake-ups", "", ("idle", 3), None, (), at_most(10)),
        Row("call timeout of 1,000,000, set, cancel", "ns", ("timers", 0), None, (), at_most(200)),
        Row("call timeout, the timing wheel alone", "ns", ("timers", 1), None, (), at_most(200)),
        Row("call that is pending, memory", "bytes", ("agent", 0), None, (), at_most(256)),
        Row("call that is served, memory", "bytes", ("agent", 1)),
        Row("64 B calls a second, 16 threads", "million", ("agent", 2), ("one thread", ("agent", 3)), (),
            [("one thread", ("agent", 3), ">=", 0.8)]),
        Row("the same, also on the server's core", "million", ("agent", 5), ("one thread", ("agent", 3)), ()),
        Row("joining a dynamic group of 200", "ms", ("agent", 4), None, (), at_most(50)),
        Row("compiling the implementation, -O2", "s", "compile", None, (), at_most(5)),
    ]


def pipe_rows():
    rows = []
    for transport in ("shm", "tcp"):
        for count in PIPES:
            def source(index, name=f"pipes {transport} {count}"):
                return (name, index)
            bounded, many = transport == "shm" and count == 1000, count == PIPES[-1]
            of = f"{transport} pipe of {count:,}"
            rows += [
                Row(f"{of}, opened", "us", source(2)),
                Row(f"{of}, idle, memory", "bytes", source(0), None, (), at_most(32768) if bounded else ()),
                Row(f"{of}, idle, descriptors", "", source(1), None, (), at_most(2) if bounded else ()),
            ]
            alone = ("alone", source(4))
            rows += [Row(f"{of}, hot, 64 B there and back", "us", source(3), alone, (), [(*alone, "<=", 1.2)]),
                     Row(f"{of}, cold, the first time", "us", source(5), ("hot", source(3)))] if many else []
    return rows


def curve_rows(channels):
    """A row for each point of the curves, and the charts that are drawn of them."""
    rows = []
    for transport in ("shm", "tcp"):
        for size in TRIP_SIZES:
            limit = ("cache line", "cache line") if transport == "shm" else ("bare socket", f"raw tcp {size}")
            rows.append(Row(f"round trip, {transport}, {size_name(size)}", "us", f"rtt {transport} {size}", limit,
                            peers_of("rtt", transport, size)))
    for size in TENSOR_SIZES:
        copy = ("best copy", [f"memcpy {size}", f"nontemporal {size}"])
        limits = {"xth": copy, "cma": ("process_vm_readv", f"readv {size}"),
                  "bulk": ("readv, 2 threads", f"readv2 {size}")}
        for transport, channel, name in channel_names(channels):
            bare = ("bare socket", f"raw tcp bw {size}") if size >= MIB else None
            limit = bare if transport == "tcp" else limits.get(channel, copy)
            rows.append(Row(f"bandwidth, {name}, {size_name(size)}", "GB/s", f"bw {name} {size}", limit,
                            peers_of("bw", transport, size)))
    return rows


def channel_names(channels):
    """(transport, channel, what its measurements are called) of each channel that this build has."""
    found = [("shm", "xth", "xth")] if "xth" in channels else []
    return found + [(transport, channel, f"{transport} {channel}") for transport, names in CHANNELS.items()
                    for channel in names if channel in channels]


def charts(channels):
    """By chart: the curves, each a label and the measurements' names by size."""
    def curve(label, name, sizes):
        return {"label": label, "points": {size: f"{name} {size}" for size in sizes}}

    trips = [curve(f"tprpc {transport}", f"rtt {transport}", TRIP_SIZES) for transport in ("shm", "tcp")]
    trips += [curve("bare socket", "raw tcp", TRIP_SIZES)]
    tensors = [curve(f"tprpc {name}", f"bw {name}", TENSOR_SIZES) for _, _, name in channel_names(channels)]
    tensors += [curve(label, name, TENSOR_SIZES) for label, name in (
        ("memcpy", "memcpy"), ("non-temporal copy", "nontemporal"), ("process_vm_readv", "readv"),
        ("process_vm_readv, 2 threads", "readv2"))]
    tensors += [curve("bare socket", "raw tcp bw", TENSOR_SIZES[1:])]
    for transport in ("shm", "tcp"):
        trips.append(curve(LABELS[transport], f"ucx rtt {transport}", TRIP_SIZES))
        tensors.append(curve(LABELS[transport], f"ucx bw {transport}", TENSOR_SIZES))
        for peer in PEERS:
            label = f"{LABELS[peer]} {LOCAL[transport]}"
            trips.append(curve(label, f"{peer} rtt {transport}", TRIP_SIZES))
            tensors.append(curve(label, f"{peer} bw {transport}", PEER_TENSOR_SIZES))
    return {"rtt": trips, "bandwidth": tensors}


def all_rows(channels):
    return (trip_rows() + tensor_rows(channels) + loaded_rows() + other_rows() + pipe_rows(), curve_rows(channels))


# ---- running and judging --------------------------------------------------------------------------------------------

def names_of(source):
    """The measurements that a source needs."""
    if isinstance(source, float):
        return []
    if isinstance(source, list):
        return source
    return [source[0] if isinstance(source, tuple) else source]


def sources_of(row):
    return [row.ours] + [side[1] for side in ([row.limit] if row.limit else []) + list(row.peers) + list(row.bounds)]


def progress(text):
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


def measure(available, needed, rounds):
    """All values of each measurement that is needed, why one could not be made, and how long each took in all."""
    values, failures, seconds = {name: [] for name in needed}, {}, {name: 0.0 for name in needed}
    for number in range(rounds):
        for name, measure_it in available.items():
            if name not in needed or name in failures:
                continue
            progress(f"round {number + 1} of {rounds}: {name}")
            begin = time.monotonic()
            try:
                values[name].append(measure_it())
            except Failed as failure:
                failures[name] = str(failure).replace(ROOT + os.sep, "")
            except LookupError as missing:
                failures[name] = f"{name}: its output has no {missing}"
            seconds[name] = round(seconds[name] + time.monotonic() - begin, 3)
    progress("")
    return values, failures, seconds


class Figures:
    """What was measured, by source."""

    def __init__(self, values, failures, rounds):
        self.values, self.failures, self.rounds = values, failures, rounds

    def of(self, source, more):
        """The figures of a source, round by round. more: whether more is better."""
        if isinstance(source, float):
            return [source] * self.rounds
        if isinstance(source, list):
            there = [self.values[name] for name in source if name not in self.failures]
            if not there:
                raise Failed(self.failures[source[0]])
            return [(max if more else min)(figures) for figures in zip(*there)]
        name = names_of(source)[0]
        if name in self.failures:
            raise Failed(self.failures[name])
        return [value[source[1]] for value in self.values[name]] if isinstance(source, tuple) else self.values[name]


def beside(ours, label, other):
    """Ours beside another's figures. An own figure of 0 beside 0 is neither more nor less."""
    ratios = [a / b if b else 1.0 if a == b else float("inf") for a, b in zip(ours, other)]
    ratio = statistics.median(ratios)
    return {"label": label, "figure": statistics.median(other), "ratio": None if ratio == float("inf") else ratio}


def judge(row, figures):
    """A row's result. What could not be measured is null, and why stands in `failures`."""
    more, failures = row.unit in MORE_IS_BETTER, []

    def try_beside(label, source):
        try:
            return beside(ours, label, figures.of(source, more))
        except Failed as failure:
            failures.append(str(failure))
            return None

    result = {"name": row.name, "unit": row.unit, "ours": None, "limit": None, "peer": None, "bounds": []}
    try:
        ours = figures.of(row.ours, more)
    except Failed as failure:
        return dict(result, failures=[str(failure)])
    result["ours"] = statistics.median(ours)
    result["limit"] = row.limit and try_beside(*row.limit)
    peers = [peer for peer in (try_beside(*peer) for peer in row.peers) if peer]
    result["peer"] = peers and (max if more else min)(peers, key=lambda peer: peer["figure"]) or None
    for label, source, sign, factor in row.bounds:
        found = try_beside(label, source) or {"label": label, "figure": None, "ratio": None}
        ratio = found["ratio"]
        met = None if ratio is None else ratio <= factor if sign == "<=" else ratio >= factor
        result["bounds"].append(dict(found, sign=sign, factor=factor, met=met))
    return dict(result, failures=failures)


def chart_points(curves, figures):
    """The curves with medians for the measurements' names; without what could not be measured."""
    found = {}
    for chart, some in curves.items():
        found[chart] = []
        for curve in some:
            points = [[size, statistics.median(figures.values[name])] for size, name in curve["points"].items()
                      if name not in figures.failures]
            found[chart].append({"label": curve["label"], "points": points})
    return found


# ---- main -----------------------------------------------------------------------------------------------------------

def write_results(folder, report, prefix, host_kind):
    now = datetime.datetime.now()
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{prefix}{now:%Y-%m-%d-%H%M%S}-{host_kind}.json")
    with open(path, "w") as file:
        json.dump({"date": f"{now:%Y-%m-%d %H:%M:%S}", **report}, file, indent=1)
        file.write("\n")
    return path


def run(options):
    channels, trouble = [], []
    try:
        channels = take.channels(options.build)
    except Failed as failure:
        trouble.append(f"which channels there are: {failure}")
    rows, curves = all_rows(channels)
    rows, curves = ([row for row in some if options.only in row.name] for some in (rows, curves))
    if not rows + curves:
        options.parser.error(f"no row's name contains \"{options.only}\"")
    cpus, load = take.two_cpus(), os.getloadavg()[0]
    print(f"{take.host_kind()}, {take.cpu_model()}, Linux {platform.release()}; medians of {options.rounds} rounds; "
          f"the ends on CPUs {cpus[0]} and {cpus[1]}; load before: {load:.2f}\n")
    if len(os.sched_getaffinity(0)) < 2:
        print("One CPU alone: whatever spins here is measured waiting for its turn.\n")
    available = measurements(options.build, channels)
    needed = {name for row in rows + curves for source in sources_of(row) for name in names_of(source)}
    if not options.only:             # some points of the charts have no row of their own
        needed |= {name for some in charts(channels).values() for curve in some for name in curve["points"].values()}
    assert needed <= set(available), needed - set(available)
    values, failures, seconds = measure(available, needed, options.rounds)
    figures = Figures(values, failures, options.rounds)
    report = {"host_kind": take.host_kind(), "cpu": take.cpu_model(), "kernel": platform.release(), "load": load,
              "rounds": options.rounds, "rows": [judge(row, figures) for row in rows],
              "curves": [judge(row, figures) for row in curves], "failures": failures, "values": values,
              "seconds": seconds}
    if not options.only:
        report["charts"] = chart_points(charts(channels), figures)
    bench_report.print_table(report)
    for text in trouble + list(dict.fromkeys(failures.values())):
        print("not measured:", text)
    prefix = "bench-part-" if options.only else "bench-"
    print("\n" + os.path.relpath(write_results(options.results, report, prefix, take.host_kind())))
    if not options.only:
        print(bench_report.draw(report, options.results))
    missed = any(bound["met"] is False for result in report["rows"] for bound in result["bounds"])
    return 1 if failures or (options.strict and missed) else 0


def main():
    parser = argparse.ArgumentParser(usage="tools/bench.py [--rounds N] [--build DIR] [--results DIR] [--only WORD] "
                                           "[--strict] [--readme [FILE]]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build", default=os.path.join(ROOT, "build"))
    parser.add_argument("--results", default=os.path.join(ROOT, "tools", "results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--readme", nargs="?", const=os.path.join(ROOT, "README.md"))
    options = parser.parse_args()
    options.parser = parser
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if not options.readme:
        return run(options)
    try:
        print(bench_report.quote(options.results, options.readme))
    except (OSError, ValueError, LookupError) as error:
        print(f"tools/bench.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
