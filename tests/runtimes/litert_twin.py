"""What LiteRT-LM makes of a file. Runs by itself, where `litert-lm-api` is installed.

python litert_twin.py FILE REQUEST.json ANSWER.json
"""

import json
import pathlib
import sys


def main(file: str, request: str, answer: str) -> None:
    import litert_lm

    asked = json.loads(pathlib.Path(request).read_text())
    engine = litert_lm.Engine(
        file,
        backend=litert_lm.Backend.CPU(thread_count=1),
        activation_data_type=litert_lm.ActivationDataType.FLOAT32,
    )
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=1)
    found = {"bos": engine.bos_token_id, "stops": engine.eos_token_ids, "ids": [], "texts": []}
    for text in asked["texts"]:
        session = engine.create_session(apply_prompt_template=False, sampler_config=greedy)
        session.run_prefill([text])
        found["ids"].append(engine.tokenize(text))
        found["texts"].append(session.run_decode().texts[0])
    pathlib.Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
