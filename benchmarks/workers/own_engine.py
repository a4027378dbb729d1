"""Our engine, without any server around it (`python -m benchmarks.workers.own_engine`)."""

from __future__ import annotations

from benchmarks.workers.job import Generate, Job, run_worker


def start(job: Job) -> Generate:
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.kv_spec import KVPool
    from engine.model.loader import load_model
    from engine.request import Request
    from engine.sampling import Sampler
    from protocol.sampling import SamplingParams

    config = EngineConfig(max_total_tokens=job.pool_tokens, **job.options)
    model = load_model(job.model, dtype=job.dtype, num_threads=job.threads)
    pool = KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages)
    engine = Engine(model=model, pool=pool, config=config, sampler=Sampler(num_threads=job.threads))
    submitted = 0

    def generate(prompts: list[list[int]], max_tokens: int) -> int:
        nonlocal submitted
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for prompt in prompts:
            submitted += 1
            engine.add(Request(key=submitted, prompt=prompt, sampling=sampling))
        tokens = 0
        while engine.has_work():
            output = engine.step()
            if output.failed:
                raise RuntimeError(f"the engine failed a request: {output.failed}")
            tokens += len(output.tokens)
        return tokens

    return generate


if __name__ == "__main__":
    run_worker(start)
