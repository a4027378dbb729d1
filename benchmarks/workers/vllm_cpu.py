"""The peer: vLLM on the CPU, run by the Python of its own environment (`PEER_PYTHON -m benchmarks.workers.vllm_cpu`).

Its engine runs in this process, so that no process more shares the cores; everything else is as it comes, unless the
job's options say otherwise. The thread count and the size of its cache are environment variables that must be set
before the import; `benchmarks.engine` sets them.
"""

from __future__ import annotations

from benchmarks.workers.job import Generate, Job, run_worker


def start(job: Job) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(model=job.model, dtype=job.dtype, max_model_len=job.max_model_len, **job.options)

    def generate(prompts: list[list[int]], max_tokens: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


if __name__ == "__main__":
    run_worker(start)
