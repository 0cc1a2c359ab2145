import asyncio
import statistics

from tests.kubernetes.test_pods import *


async def test_bench(node, cluster, namespace):
    pods = Pods(cluster, pod_world.function("bench", namespace, pages=131072, memory="700Mi"))
    names = [f"bench-{i}" for i in range(17)]
    await asyncio.to_thread(pods.make, *names)
    await asyncio.to_thread(eventually, lambda: node.log.count("waits for an instance") >= 17, within_s=40)
    cold = []
    c = await checkpoint(node, pods)
    print(c.seconds)
    out = {"restore": [], "thaw": []}
    ph = {}
    for i in range(10):
        r = await node.start_instance(pods.function)
        await asyncio.sleep(0.2)
        out[r.record.start_mode].append((r.record.ended_ns - r.record.started_ns) / 1e6)
        for p in r.record.phases:
            ph.setdefault((r.record.start_mode, p.name), []).append((p.end_ns - p.start_ns) / 1e6)
    for i in range(6):
        h = await node.call(Prepare, function=pods.function)
        await asyncio.sleep(1.0)
        r = await node.start_instance(pods.function)
        await asyncio.sleep(0.2)
        out[r.record.start_mode].append((r.record.ended_ns - r.record.started_ns) / 1e6)
        for p in r.record.phases:
            ph.setdefault((r.record.start_mode, p.name), []).append((p.end_ns - p.start_ns) / 1e6)
    for k, v in out.items():
        print(k, len(v), "median %.2f max %.2f" % (statistics.median(v), max(v)), [round(x, 1) for x in v])
    for k, v in ph.items():
        print(k, round(statistics.median(v), 2), round(max(v), 2))
