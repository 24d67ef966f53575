"""What PEFT makes of a base folder. Runs by itself: torch beside TensorFlow may crash.

A request names the base, and an adapter to load or the arguments of a `LoraConfig` for a new one.
Where it says where to save, the adapter is trained and saved there.
"""

from typing import Any

import twins


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    ids = torch.tensor(asked["ids"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["base"], dtype="float32")
    if "adapter" in asked:
        trains = "save" in asked
        model = peft.PeftModel.from_pretrained(model, asked["adapter"], is_trainable=trains)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**asked["config"]))
    losses = train(model, ids) if "save" in asked else []
    if "save" in asked:
        model.save_pretrained(asked["save"])
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    return {"logits": logits.tolist(), "losses": losses}


def train(model: Any, ids: Any) -> list[float]:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    twins.serve(answer)
