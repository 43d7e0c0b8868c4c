#!/usr/bin/env python3
"""Makes one trace of those that several workers wrote (tprpc_agent_desc.trace):

    tools/merge-traces.py traces/*.json > trace.json      for ui.perfetto.dev or chrome://tracing

Events are sorted by time. Workers that share a process, or whose process numbers are equal by chance, are kept apart by
adding to these. Files of another boot, which is another host, have another clock: their times are moved so that each
call is received after it was sent and its outcome comes after its answer, as near to the middle as that allows; how
much is said on stderr.
"""

import argparse
import json
import sys

STEP = 1 << 22                           # more than any process number of Linux
ORDER = {'M': 0, 'X': 1, 'b': 1, 's': 2, 't': 3, 'f': 4, 'e': 5}


class Trace:
    def __init__(self, path):
        with open(path, encoding='utf-8') as file:
            self.events = json.load(file)
        clocks = [e['args']['boot'] for e in self.events if e['ph'] == 'M' and e['name'] == 'tprpc_clock']
        names = [e['args']['name'] for e in self.events if e['ph'] == 'M' and e['name'] == 'process_name']
        if not clocks or not names:
            raise ValueError('no trace of tprpc')
        self.path, self.clock, self.worker, self.pid = path, clocks[0], names[0], self.events[0]['pid']

    def move(self, us):
        for event in self.events:
            if event['ph'] != 'M':
                event['ts'] = round(event['ts'] + us, 3)

    def renumber(self, add):
        for event in self.events:
            event['pid'] += add
            event['tid'] += add


def steps(traces):
    """Of each call: when it was sent, when it had a good outcome (or None), on the caller's clock; and its first and last
    step on the clock of the one called."""
    sent, ended, served = {}, {}, {}
    for trace in traces:
        for event in trace.events:
            if event['ph'] == 's':
                sent[event['id']] = event['ts'], trace.clock
            elif event['ph'] == 'X' and event.get('args', {}).get('status') == 'ok' and 'of' in event['args']:
                ended[event['args']['call']] = event['ts']
            elif event['ph'] == 't':
                first, last, _ = served.get(event['id'], (event['ts'], event['ts'], None))
                served[event['id']] = min(first, event['ts']), max(last, event['ts']), trace.clock
    for call, (ts, clock) in sent.items():
        if call in served:
            first, last, other = served[call]
            yield clock, ts, ended.get(call), other, first, last


def shifts(traces):
    """By how many us each clock's times are to be moved, to be those of the first file's."""
    bounds = {}                                          # (known, other): [the least, the most] to add to the other's
    for clock, sent, ended, other, first, last in steps(traces):
        if clock == other:
            continue
        least, most = sent - first, float('inf') if ended is None else ended - last
        for pair, low, high in (((clock, other), least, most), ((other, clock), -most, -least)):
            old = bounds.setdefault(pair, [-float('inf'), float('inf')])
            bounds[pair] = [max(old[0], low), min(old[1], high)]
    known, queue = {traces[0].clock: 0.0}, [traces[0].clock]
    for clock in queue:
        for (near, far), (low, high) in bounds.items():
            if near == clock and far not in known:
                middle = low if high == float('inf') else high if low == -float('inf') else (low + high) / 2
                known[far] = known[clock] + middle
                queue.append(far)
    return known


def merge(traces):
    known, used = shifts(traces), set()
    clocks = list(dict.fromkeys(trace.clock for trace in traces))
    for trace in traces:
        if trace.clock not in known:
            print(f'{trace.path}: another clock, and no call tells how they differ', file=sys.stderr)
        elif known[trace.clock]:
            print(f'{trace.path}: another clock, moved by {known[trace.clock]:.3f} us', file=sys.stderr)
            trace.move(known[trace.clock])
        add = STEP * clocks.index(trace.clock)
        while trace.pid + add in used:
            add += STEP * len(clocks)
        used.add(trace.pid + add)
        trace.renumber(add)
    events = [event for trace in traces for event in trace.events]
    return sorted(events, key=lambda e: (e['ts'], ORDER.get(e['ph'], 6), -e.get('dur', 0)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', nargs='+')
    traces = []
    for path in parser.parse_args().file:
        try:
            traces.append(Trace(path))
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            sys.exit(f'merge-traces.py: {path}: {error}')
    lines = [json.dumps(event, ensure_ascii=False, separators=(',', ':')) for event in merge(traces)]
    sys.stdout.buffer.write(('[\n' + ',\n'.join(lines) + '\n]\n').encode())


if __name__ == '__main__':
    main()
