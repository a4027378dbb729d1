"""The role-free inference engine: requests, scheduler, paged KV, prefix cache, model, sampling. No ray, no HTTP."""
