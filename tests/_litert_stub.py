"""A stand-in for the converter of LiteRT, which is not installed beside this library."""

# In place of the converter: the weights as it lays them down, in another order, some of them twice.
LAY_DOWN = """
import pathlib, sys
from safetensors.numpy import load_file
tensors = load_file(sys.argv[1] + "/model.safetensors")
made = pathlib.Path(sys.argv[2])
made.mkdir()
data = b"head"
for name, value in sorted(tensors.items(), reverse=True):
    value = value + 1 if "norm" in name else value
    data += value.tobytes()[:-4] + value.tobytes() + b"\\0" * 12
(made / "model.litertlm").write_bytes(data)
"""
