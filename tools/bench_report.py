"""What bench.py and gpu-bench.py show of a run: the table, the charts (SVG, drawn by gnuplot), the README's section.
"""
import glob
import json
import os
import shutil
import subprocess

CHARTS = {                           # by name: title, what stands at the y axis
    "rtt": ("There and back", "us"),
    "bandwidth": ("Tensors one way", "GB/s (10^9)"),
}
GPU_CHARTS = {
    "gpu-rtt": ("From one GPU to another and back", "us"),
    "gpu-bandwidth": ("From one GPU to another", "GB/s (10^9)"),
}


# ---- the table ------------------------------------------------------------------------------------------------------

def figure(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ratio_of(side):
    return "-" if not side or side["ratio"] is None else f"{side['ratio']:.2f}"


def bound_text(bound):
    if bound["label"] == "bound":
        return f"{bound['sign']} {figure(bound['figure'])}"
    return f"{bound['sign']} {bound['factor']:g} of {bound['label']}"


def verdict(bound):
    return "not measured" if bound["met"] is None else "ok" if bound["met"] else "MISSED"


def print_table(report):
    line = "{:<41} {:>9} {:<8} {:>9} {:<16} {:>6}  {:>9} {:<15} {:>6}  {}"
    print(line.format("what", "ours", "", "limit", "", "ratio", "best peer", "", "ratio", "bound").rstrip())
    for row in report["rows"] + report["curves"]:
        limit, peer = row["limit"], row["peer"]
        bounds = "; ".join(f"{bound_text(b)}: {ratio_of(b)} {verdict(b)}" for b in row["bounds"])
        if row["ours"] is None:
            bounds = "not measured"
        print(line.format(row["name"], figure(row["ours"]), row["unit"], figure(limit and limit["figure"]),
                          limit["label"] if limit else "", ratio_of(limit), figure(peer and peer["figure"]),
                          peer["label"] if peer else "", ratio_of(peer), bounds).rstrip())


def markdown_table(report):
    lines = ["| what | ours | limit | ratio | best peer | ratio | bound |", "|---|---|---|---|---|---|---|"]

    def cell(side):
        return f"{figure(side['figure'])} ({side['label']})" if side else "-"

    for row in report["rows"]:
        bounds = "; ".join(f"{bound_text(b)}: {verdict(b)}" for b in row["bounds"])
        lines.append(f"| {row['name']} | {figure(row['ours'])} {row['unit']} | {cell(row['limit'])} | "
                     f"{ratio_of(row['limit'])} | {cell(row['peer'])} | {ratio_of(row['peer'])} | {bounds} |"
                     .replace("  ", " "))
    return "\n".join(lines)


# ---- the charts -----------------------------------------------------------------------------------------------------

def chart_path(folder, chart, report):
    return os.path.join(folder, f"{chart}-{report['host_kind']}.svg")


def chart_script(chart, curves, path):
    """A script for gnuplot: ours thick, peers thin, the medium itself dashed; colours told apart without colour vision
    by the marks."""
    title, unit = {**CHARTS, **GPU_CHARTS}[chart]
    sizes = sorted({point[0] for curve in curves for point in curve["points"]})
    ticks = ", ".join(f'"{tick(size)}" {size}' for size in sizes)
    lines = ['set terminal svg size 960,560 dynamic background "white" font "sans-serif,13" noenhanced',
             f'set output "{path}"', f'set title "{title}"', f'set ylabel "{unit}"', "set logscale xy",
             f"set xtics ({ticks})", 'set key outside right top noenhanced', "set grid ytics lc rgb '#dddddd'"]
    plots = []
    for number, curve in enumerate(curves):
        label = curve["label"]
        peer = label.startswith(("UCX", "ZeroMQ", "nng", "PyTorch", "NCCL"))
        style = "lw 3" if label.startswith("tprpc") else "lw 1" if peer else "lw 1 dt 2"
        lines += [f"$curve{number} << END"] + [f"{size} {value:g}" for size, value in curve["points"]] + ["END"]
        plots.append(f'$curve{number} using 1:2 with linespoints {style} pt {number + 1} ps 0.6 title "{label}"')
    return "\n".join(lines) + "\nplot " + ", \\\n     ".join(plots) + "\n"


def tick(size):
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit:
            return f"{size // unit}{name}"
    return str(size)


def draw(report, folder):
    """Draws a run's charts into the folder; those of another run on such a host are replaced. Returns a sentence."""
    if not shutil.which("gnuplot"):
        return "no charts: gnuplot is not installed: apt-get install gnuplot-nox"
    drawn = []
    for chart, curves in report["charts"].items():
        curves = [curve for curve in curves if curve["points"]]
        path = chart_path(folder, chart, report)
        if not curves:
            continue
        done = subprocess.run(["gnuplot"], input=chart_script(chart, curves, path), capture_output=True, text=True,
                              check=False)
        if done.returncode != 0:
            return f"no charts: gnuplot: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}"
        drawn.append(os.path.relpath(path))
    return " ".join(drawn) or "no charts: nothing for them was measured"


# ---- the README -----------------------------------------------------------------------------------------------------

def newest_whole(folder, kind):
    paths = [path for path in glob.glob(os.path.join(folder, f"{kind}-*.json")) if f"/{kind}-part-" not in path]
    if not paths:
        raise LookupError(f"no whole run lies in {folder}: make {kind}")
    return max(paths, key=lambda path: os.path.basename(path))


def images(charts, report, folder, readme):
    def image(chart):
        path = os.path.relpath(chart_path(folder, chart, report), os.path.dirname(os.path.abspath(readme)))
        return f"![{charts[chart][0]}, {charts[chart][1]}, by size in bytes]({path})"

    return "\n\n".join(image(chart) for chart in charts if os.path.exists(chart_path(folder, chart, report)))


def section(report, folder, readme):
    kernel = report["kernel"].split("-")[0]
    machine = f"{report['host_kind']} ({report['cpu']}, Linux {kernel})"
    return (f"Measured {report['date'][:10]} on a {machine}, both ends on it: medians of {report['rounds']} rounds.\n\n"
            f"{markdown_table(report)}\n\n{images(CHARTS, report, folder, readme)}".rstrip())


def quote(folder, readme, kind="bench", section_of=section):
    """Makes the newest whole run of `make KIND` the one that the README quotes. Returns a sentence."""
    begins, ends = f"<!-- {kind}.py --readme writes what follows -->", f"<!-- {kind}.py --readme wrote this -->"
    path = newest_whole(folder, kind)
    with open(path) as file:
        report = json.load(file)
    with open(readme) as file:
        text = file.read()
    before, begin, rest = text.partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end:
        raise LookupError(f"{readme} has no line \"{begins}\" with \"{ends}\" after it")
    said = draw(report, folder)
    quoted = os.path.join(folder, f"quoted-{report['host_kind']}.json")
    shutil.copyfile(path, quoted)
    with open(readme, "w") as file:
        file.write(f"{before}{begins}\n\n{section_of(report, folder, readme)}\n\n{ends}{after}")
    return f"{os.path.relpath(readme)} quotes {os.path.relpath(path)}, kept as {os.path.relpath(quoted)}; {said}"
