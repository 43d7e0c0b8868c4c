"""What bench.py measures with: a function takes one measurement, and raises Failed with a sentence where it cannot.
"""
import glob
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TIME_LIMIT_S = 180                   # of one measurement
IDLE_S = 10                          # how long idle agents are watched


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
    return picked(result, wanted, command)


def picked(result, wanted, command):
    keys = wanted if isinstance(wanted, list) else [wanted]
    if any(result.get(key) is None for key in keys):
        raise Failed(f"{' '.join(command)}: gave no {' or '.join(key for key in keys if result.get(key) is None)}")
    return [result[key] for key in keys] if isinstance(wanted, list) else result[wanted]


def peer(build, name, wanted, test, transport, size, iters):
    """One figure of bench-zmq or bench-nng."""
    command = [os.path.join(build, f"bench-{name}"), "--test", test, "--transport", transport, "--size", str(size),
               "--iters", str(iters)]
    if not os.path.exists(command[0]):
        raise Failed(f"{command[0]} is not built: tools/setup.sh bench installs the library, then make bench")
    return picked(parse_json(run(command), command[0]), wanted, command)


def channels(build):
    """The names of the channels that a build has."""
    command = [os.path.join(build, "tprpc-info"), "--json"]
    return [channel["name"] for channel in parse_json(run(command), command[0])["channels"]]


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


def ucx_round_trip_us(transports, size, iters):
    result = ucx("tag_lat", transports, size, iters)
    return 2 * next(value for key, value in result.items() if "percentile" in key)       # it gives one way


def ucx_rate_mps(transports, size, iters):
    return ucx("tag_bw", transports, size, iters)["overall_mr"] / 1e6


def ucx_bandwidth_gbps(transports, size, iters):
    return ucx("tag_bw", transports, size, iters)["overall_bw"] * (1 << 20) / 1e9    # its MB is 2^20


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


def start_idle(build, threads):
    """Two connected agents in two processes; returns what stops them, and their process ids."""
    command = [os.path.join(build, "bench-idle")] + (["--threads", str(threads)] if threads else [])
    try:
        agents = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from error
    words = agents.stdout.readline().split()
    if len(words) != 3 or words[0] != "ready":
        stop(agents)
        raise Failed("bench-idle: " + (agents.stderr.read().strip() or "it did not become ready"))
    return agents, words[1:]


def idle(build):
    """CPU milliseconds and wake-ups of two agents while nothing happens: [polled, polled, threaded, threaded]. The two
    groups are watched at the same time, for sleepers do not disturb each other."""
    groups, figures = [], []
    try:
        for threads in (0, 1):
            groups.append(start_idle(build, threads))
        before = [[usage_of(pid) for pid in pids] for _, pids in groups]
        time.sleep(IDLE_S)
        after = [[usage_of(pid) for pid in pids] for _, pids in groups]
    finally:
        for agents, _ in groups:
            stop(agents)
    for first, last in zip(before, after):
        figures.append(sum(b[0] - a[0] for a, b in zip(first, last)) / 1e6)
        figures.append(sum(b[1] - a[1] for a, b in zip(first, last)))
    return figures


def loaded(build, transport):
    """Of calls while tensors stream: [p99, p99 alone, GB/s, GB/s alone, calls issued late, what p99 may be]."""
    keys = ["p99_us", "idle_p99_us", "bandwidth_gbps", "unloaded_gbps", "late"]
    figures = perf(build, keys, "--test", "loaded", "--transport", transport, "--spin", "always", expect=transport)
    return figures + [max(3 * figures[1], 10.0)]


def timers(build):
    """[ns that a timeout adds to a call and to its end, ns of the timing wheel alone], with a million pending"""
    command = os.path.join(build, "bench-timers")
    t = parse_json(run([command, "--rounds", "1"]), command)
    keys = ["set_ns", "cancel_ns", "call_ns", "call_cancel_ns", "bare_ns", "bare_cancel_ns"]
    missing = [key for key in keys if not isinstance(t.get(key), (int, float))]
    if missing:
        raise Failed(f"{command}: gave no {' or '.join(missing)}")
    return [t["call_ns"] + t["call_cancel_ns"] - t["bare_ns"] - t["bare_cancel_ns"], t["set_ns"] + t["cancel_ns"]]


def agent(build):
    """[bytes of a pending call, of one that is served, calls/s of 16 threads, of one, ms of a join in a group of 200,
    calls/s of 16 threads that may take the server's core]"""
    command = os.path.join(build, "bench-agent")
    t = parse_json(run([command]), command)
    keys = ["pending_bytes", "serving_bytes", "threads_mps", "one_mps", "join_ms", "crowded_mps"]
    missing = [key for key in keys if not isinstance(t.get(key), (int, float))]
    if missing:
        raise Failed(f"{command}: gave no {' or '.join(missing)}")
    return [t[key] for key in keys]


def compile_s():
    begin = time.monotonic()
    run(["gcc", "-std=c99", "-O2", "-DTPRPC_IMPLEMENTATION", "-x", "c", "-c", os.path.join(ROOT, "tprpc.h"), "-o",
         "/dev/null"])
    return time.monotonic() - begin
