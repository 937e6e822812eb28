"""A process with vLLM that answers lines of JSON: `{"load": adapter}` or `{"ask": [[prompt, adapter], ...]}`.

It starts with `{"model": ..., other arguments of vllm.LLM}`. An adapter is `[name, number, folder]` or null.
"""

import json
import os
import sys


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints goes to the standard error
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    def request(adapter):
        return adapter and LoRARequest(*adapter)

    llm = LLM(enforce_eager=True, enable_lora=True, max_model_len=128, **json.loads(sys.argv[1]))
    os.write(out, b"{}\n")
    for line in sys.stdin:
        command = json.loads(line)
        if "load" in command:
            try:
                answer = llm.llm_engine.add_lora(request(command["load"])) and None
            except Exception as error:
                answer = str(error)
        else:
            prompts, adapters = zip(*command["ask"], strict=True)
            options = {"temperature": 0, "max_tokens": 20, "logprobs": 5, "ignore_eos": True} | command.get(
                "sampling", {}
            )
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                SamplingParams(**options),
                lora_request=[request(adapter) for adapter in adapters],
                use_tqdm=False,
            )
            answer = [
                [
                    list(output.outputs[0].token_ids),
                    [sorted([i, p.logprob] for i, p in step.items()) for step in output.outputs[0].logprobs or ()],
                ]
                for output in outputs
            ]
        os.write(out, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main()
