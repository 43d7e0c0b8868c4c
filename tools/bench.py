#!/usr/bin/env python3
"""make bench: what tprpc costs on this machine, beside the medium itself and beside UCX.

Every figure is the median of several rounds. A round runs everything once, ours next to what it is compared with, and a
ratio is the median of the rounds' ratios: a virtual machine's cores move under it (the same cache line took 0.10 and
0.45 us there and back within a minute), so what counts is what was measured side by side. Prints a table, and writes it
with all single values to tools/results/.

usage: tools/bench.py [--rounds N] [--build DIR] [--results DIR] [--only WORD] [--strict]
  --only WORD   the rows whose name contains WORD
  --strict      exit status 1 when a bound is missed (it is 1 anyway when something could not be measured)
"""
import argparse
import datetime
import glob
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TIME_LIMIT_S = 180                   # of one measurement
IDLE_S = 10                          # how long idle agents are watched
SMALL, LARGE = "64", "64M"


class Failed(Exception):
    """A measurement that could not be made; its text says why."""


# ---- the machine ----------------------------------------------------------------------------------------------------

def core_of(cpu):
    def read(name):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/{name}") as file:
                return file.read()
        except OSError:
            return str(cpu)
    return read("physical_package_id"), read("core_id")


def two_cpus():
    """The two CPUs that tprpc-perf pins its ends to: the first one allowed, and the first one of another core."""
    cpus = sorted(os.sched_getaffinity(0))
    others = [cpu for cpu in cpus if core_of(cpu) != core_of(cpus[0])] or cpus[1:] or cpus
    return cpus[0], others[0]


def host_kind():
    """What the machine is, without its name: "2-core-x86_64-vm"."""
    with open("/proc/cpuinfo") as file:
        virtual = "hypervisor" in file.read()
    cores = len(os.sched_getaffinity(0))
    return f"{cores}-core-{platform.machine()}" + ("-vm" if virtual else "")


def cpu_model():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- running things -------------------------------------------------------------------------------------------------

def run(command, env=None):
    """The standard output of a command that must succeed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
                              env=dict(os.environ, **(env or {})))
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(command)}: no end after {TIME_LIMIT_S} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = [line for line in lines if "error" in line] or lines[-1:] or [f"exit status {done.returncode}"]
        raise Failed(f"{' '.join(command)}: {said[0]}")
    return done.stdout


def parse_json(text, command):
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failed(f"{command}: its output is not JSON") from error


def perf(build, wanted, *options, expect=None):
    """One figure of tprpc-perf, or several when wanted is a list. expect: the transport that must have been used."""
    command = [os.path.join(build, "tprpc-perf"), "--json", *options]
    result = parse_json(run(command), command[0])
    if expect and result.get("transport") != expect:
        raise Failed(f"{' '.join(command)}: used {result.get('transport')}, not {expect}")
    keys = wanted if isinstance(wanted, list) else [wanted]
    if any(result.get(key) is None for key in keys):
        raise Failed(f"{' '.join(command)}: gave no {' or '.join(keys)}")
    return [result[key] for key in keys] if isinstance(wanted, list) else result[wanted]


# ---- UCX ------------------------------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_listening(port, server):
    """Until the server listens. Asks the kernel: a trial connection would be taken for the client's."""
    for _ in range(500):
        with open("/proc/net/tcp") as file:
            if any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in file):
                return
        if server.poll() is not None:
            raise Failed("ucx_perftest: the server ended at once")
        time.sleep(0.01)
    raise Failed("ucx_perftest: the server does not listen after 5 s")


def stop(process):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def ucx(test, transports, size, iters):
    """One run of ucx_perftest between two pinned processes of this host, as a dictionary of its CSV output."""
    tool = shutil.which("ucx_perftest")
    if not tool:
        raise Failed("ucx_perftest is not installed: apt-get install ucx-utils")
    env, port, cpus = {"UCX_TLS": transports}, free_port(), two_cpus()
    server = subprocess.Popen(["taskset", "-c", str(cpus[1]), tool, "-p", str(port)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env=dict(os.environ, **env))
    try:
        wait_listening(port, server)
        text = run(["taskset", "-c", str(cpus[0]), tool, "127.0.0.1", "-p", str(port), "-t", test, "-s", str(size),
                    "-n", str(iters), "-f", "-v"], env)
    finally:
        stop(server)
    return parse_ucx(text)


def parse_ucx(text):
    """-f -v prints a line of names that begins with "iterations" and, at the end, one of values."""
    lines = [line.strip() for line in text.splitlines() if line.count(",") >= 7]
    if len(lines) < 2 or not lines[0].startswith("iterations"):
        raise Failed("ucx_perftest: its output has another form")
    return dict(zip(lines[0].split(","), (float(value) for value in lines[-1].split(","))))


def ucx_round_trip_us(transports, iters):
    result = ucx("tag_lat", transports, SMALL, iters)
    return 2 * next(value for key, value in result.items() if "percentile" in key)       # it gives one way


def ucx_rate_mps(transports, iters):
    return ucx("tag_bw", transports, SMALL, iters)["overall_mr"] / 1e6


def ucx_bandwidth_gbps(transports, iters):
    return ucx("tag_bw", transports, 64 << 20, iters)["overall_bw"] * (1 << 20) / 1e9    # its MB is 2^20


# ---- what needs more than one command -------------------------------------------------------------------------------

def usage_of(pid):
    """CPU nanoseconds, and voluntary context switches, of all threads of a process."""
    cpu_ns = switches = 0
    for task in glob.glob(f"/proc/{pid}/task/*"):
        with open(task + "/schedstat") as file:
            cpu_ns += int(file.read().split()[0])
        with open(task + "/status") as file:
            switches += sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt"))
    return cpu_ns, switches


def idle(build, threads):
    """[CPU milliseconds, wake-ups] of two connected agents together, while nothing happens."""
    command = [os.path.join(build, "bench-idle")] + (["--threads", str(threads)] if threads else [])
    try:
        agents = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error
    try:
        words = agents.stdout.readline().split()
        if len(words) != 3 or words[0] != "ready":
            raise Failed("bench-idle: " + (agents.stderr.read().strip() or "it did not become ready"))
        before = [usage_of(pid) for pid in words[1:]]
        time.sleep(IDLE_S)
        after = [usage_of(pid) for pid in words[1:]]
    finally:
        stop(agents)
    return [sum(a[0] - b[0] for a, b in zip(after, before)) / 1e6, sum(a[1] - b[1] for a, b in zip(after, before))]


def timers(build):
    """[ns that a timeout adds to a call and to its end, ns of the timing wheel alone], with a million pending"""
    command = os.path.join(build, "bench-timers")
    t = parse_json(run([command, "--rounds", "1"]), command)
    keys = ["set_ns", "cancel_ns", "call_ns", "call_cancel_ns", "bare_ns", "bare_cancel_ns"]
    missing = [key for key in keys if not isinstance(t.get(key), (int, float))]
    if missing:
        raise Failed(f"{command}: gave no {' or '.join(missing)}")
    return [t["call_ns"] + t["call_cancel_ns"] - t["bare_ns"] - t["bare_cancel_ns"], t["set_ns"] + t["cancel_ns"]]


def compile_s():
    begin = time.monotonic()
    run(["gcc", "-std=c99", "-O2", "-DTPRPC_IMPLEMENTATION", "-x", "c", "-c", os.path.join(ROOT, "tprpc.h"), "-o",
         "/dev/null"])
    return time.monotonic() - begin


# ---- the rows -------------------------------------------------------------------------------------------------------
#
# A measurement is taken once a round and gives one figure or several. A row compares a figure with another one, or with
# a number, and may have a bound: ("<=", ratio) or (">=", ratio).

def measurements(build):
    def small(test, transport, spin):
        return lambda: perf(build, "p50_us", "--test", test, "--transport", transport, "--size", SMALL, "--spin", spin,
                            expect=transport)

    def frame(transport):
        return lambda: perf(build, ["p999_us", "bandwidth_gbps"], "--test", "frame", "--transport", transport,
                            "--spin", "always", expect=transport)

    def large(test):
        return lambda: perf(build, "bandwidth_gbps", "--test", test, "--transport", "tcp", "--size", LARGE,
                            "--spin", "always", expect="tcp")

    return {
        "cache line": small("raw", "shm", "always"),
        "rtt shm": small("rtt", "shm", "always"),
        "ucx shm": lambda: ucx_round_trip_us("posix,self", 500000),
        "rpc shm": small("rpc", "shm", "always"),
        "raw tcp spinning": small("raw", "tcp", "always"),
        "rtt tcp spinning": small("rtt", "tcp", "always"),
        "ucx tcp": lambda: ucx_round_trip_us("tcp,self", 50000),
        "raw tcp sleeping": small("raw", "tcp", "never"),
        "rtt tcp sleeping": small("rtt", "tcp", "never"),
        "ucx rate": lambda: ucx_rate_mps("posix,self", 3000000),
        "rate shm": lambda: perf(build, "rate_mps", "--test", "rate", "--transport", "shm", "--size", SMALL, "--spin",
                                 "always", expect="shm"),
        "raw tcp bandwidth": large("raw"),
        "bw tcp": large("bw"),
        "ucx tcp bandwidth": lambda: ucx_bandwidth_gbps("tcp,self", 40),
        "frame tcp": frame("tcp"),
        "frame shm": frame("shm"),
        "idle polled": lambda: idle(build, 0),
        "idle threaded": lambda: idle(build, 1),
        "pipes shm": lambda: perf(build, ["bytes_per_pipe", "fds_per_pipe", "connect_us"], "--test", "pipes",
                                  "--transport", "shm", "--count", "1000", expect="shm"),
        "timers": lambda: timers(build),
        "compile": compile_s,
    }


# name, unit, ours (measurement, or measurement and index), what it is compared with and its name, bound on the ratio
ROWS = [
    ("64 B there and back, shm", "us", "rtt shm", "ucx shm", "UCX posix", ("<=", 1.0)),
    ("  beside the cache line alone", "us", "rtt shm", "cache line", "cache line", None),
    ("64 B call and reply, shm", "us", "rpc shm", "ucx shm", "UCX posix", ("<=", 1.5)),
    ("64 B there and back, tcp, spinning", "us", "rtt tcp spinning", "raw tcp spinning", "bare socket", ("<=", 1.2)),
    ("  beside UCX", "us", "rtt tcp spinning", "ucx tcp", "UCX tcp", None),
    ("64 B there and back, tcp, sleeping", "us", "rtt tcp sleeping", "raw tcp sleeping", "bare socket", ("<=", 1.2)),
    ("64 B messages a second, shm", "million", "rate shm", 5.0, "bound", (">=", 1.0)),
    ("  beside UCX", "million", "rate shm", "ucx rate", "UCX posix", None),
    ("64 MiB tensors, tcp", "GB/s", "bw tcp", "raw tcp bandwidth", "bare socket", (">=", 0.9)),
    ("  beside UCX", "GB/s", "bw tcp", "ucx tcp bandwidth", "UCX tcp", None),
    ("poll of a 1 ms budget, p99.9, tcp", "us", ("frame tcp", 0), 1500.0, "bound", ("<=", 1.0)),
    ("poll of a 1 ms budget, p99.9, shm", "us", ("frame shm", 0), 1500.0, "bound", ("<=", 1.0)),
    ("two idle agents, 10 s, CPU", "ms", ("idle polled", 0), 2.0, "bound", ("<=", 1.0)),
    ("two idle agents, 10 s, wake-ups", "", ("idle polled", 1), 10.0, "bound", ("<=", 1.0)),
    ("  threaded: CPU", "ms", ("idle threaded", 0), 2.0, "bound", ("<=", 1.0)),
    ("  threaded: wake-ups", "", ("idle threaded", 1), 10.0, "bound", ("<=", 1.0)),
    ("idle shm pipe of 1,000, memory", "bytes", ("pipes shm", 0), 32768.0, "bound", ("<=", 1.0)),
    ("idle shm pipe of 1,000, descriptors", "", ("pipes shm", 1), 2.0, "bound", ("<=", 1.0)),
    ("call timeout of 1,000,000, set, cancel", "ns", ("timers", 0), 200.0, "bound", ("<=", 1.0)),
    ("  the timing wheel alone", "ns", ("timers", 1), 200.0, "bound", ("<=", 1.0)),
    ("compiling the implementation, -O2", "s", "compile", 5.0, "bound", ("<=", 1.0)),
]


def rows_about(word):
    """Rows whose name contains the word, and the indented ones that belong to them."""
    rows, taken = [], False
    for row in ROWS:
        taken = word in row[0] or (taken and row[0].startswith(" "))
        rows += [row] if taken else []
    return rows


def measurement_of(source):
    return source[0] if isinstance(source, tuple) else source


def progress(text):
    if sys.stderr.isatty():
        print(f"\r{text:<50}\r", end="", file=sys.stderr, flush=True)


def measure(build, rows, rounds):
    """All values of each measurement that the rows need, and why one could not be made."""
    needed = {measurement_of(side) for row in rows for side in row[2:4] if not isinstance(side, float)}
    values, failures = {name: [] for name in needed}, {}
    for number in range(rounds):
        for name, take in measurements(build).items():
            if name not in needed or name in failures:
                continue
            progress(f"round {number + 1} of {rounds}: {name}")
            try:
                values[name].append(take())
            except Failed as failure:
                failures[name] = str(failure)
            except LookupError as missing:
                failures[name] = f"{name}: its output has no {missing}"
    progress("")
    return values, failures


def all_of(source, values, rounds):
    """The figures of one side of a row, round by round."""
    if isinstance(source, float):
        return [source] * rounds
    if isinstance(source, tuple):
        return [value[source[1]] for value in values[source[0]]]
    return values[source]


def judge(row, values, failures, rounds):
    name, unit, ours, peer, peer_name, bound = row
    result = {"name": name.strip(), "unit": unit, "compared_with": peer_name, "bound": bound and list(bound)}
    failed = [failures[measurement_of(side)] for side in (ours, peer)
              if not isinstance(side, float) and measurement_of(side) in failures]
    if failed:
        return dict(result, ours=None, figure=None, ratio=None, met=None, failure=failed[0])
    mine, other = all_of(ours, values, rounds), all_of(peer, values, rounds)
    ratio = statistics.median(a / b for a, b in zip(mine, other))
    met = bound and (ratio <= bound[1] if bound[0] == "<=" else ratio >= bound[1])
    return dict(result, ours=statistics.median(mine), figure=statistics.median(other), ratio=ratio, met=met)


def figure(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_table(rows, results):
    line = "{:<40} {:>10} {:<8} {:>10} {:<12} {:>6}  {:<8} {}"
    print(line.format("what", "ours", "", "against", "", "ratio", "bound", ""))
    for row, r in zip(rows, results):
        verdict = "not measured" if "failure" in r else "" if r["met"] is None else "ok" if r["met"] else "MISSED"
        bound = f"{r['bound'][0]} {r['bound'][1]:g}" if r["bound"] else ""
        ratio = "-" if r["ratio"] is None else f"{r['ratio']:.2f}"
        print(line.format(row[0], figure(r["ours"]), r["unit"], figure(r["figure"]), r["compared_with"], ratio, bound,
                          verdict).rstrip())
    for text in dict.fromkeys(r["failure"] for r in results if "failure" in r):
        print("not measured:", text)


def write_results(folder, rounds, results, values):
    now = datetime.datetime.now()
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"bench-{now:%Y-%m-%d-%H%M%S}-{host_kind()}.json")
    with open(path, "w") as file:
        json.dump({"date": f"{now:%Y-%m-%d %H:%M:%S}", "host_kind": host_kind(), "cpu": cpu_model(),
                   "kernel": platform.release(), "load": os.getloadavg()[0], "rounds": rounds, "rows": results,
                   "values": values}, file, indent=1)
        file.write("\n")
    return path


def main():
    parser = argparse.ArgumentParser(usage="tools/bench.py [--rounds N] [--build DIR] [--results DIR] [--only WORD] "
                                           "[--strict]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build", default=os.path.join(ROOT, "build"))
    parser.add_argument("--results", default=os.path.join(ROOT, "tools", "results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args()
    rows = rows_about(options.only)
    if options.rounds < 1 or not rows:
        parser.error("--rounds is at least 1" if rows else f"no row's name contains \"{options.only}\"")
    cpus = two_cpus()
    print(f"{host_kind()}, {cpu_model()}, Linux {platform.release()}; medians of {options.rounds} rounds; "
          f"the ends on CPUs {cpus[0]} and {cpus[1]}; load before: {os.getloadavg()[0]:.2f}\n")
    if len(os.sched_getaffinity(0)) < 2:
        print("One CPU alone: whatever spins here is measured waiting for its turn.\n")
    values, failures = measure(options.build, rows, options.rounds)
    results = [judge(row, values, failures, options.rounds) for row in rows]
    print_table(rows, results)
    print("\n" + os.path.relpath(write_results(options.results, options.rounds, results, values)))
    missed = any(r["met"] is False for r in results)
    return 1 if failures or (options.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
