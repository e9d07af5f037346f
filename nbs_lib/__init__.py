import gc
import os

__version__ = "0.1.0"
# limit OpenMP's busy waiting; read when torch is loaded, see 01_runtime
os.environ.setdefault("GOMP_SPINCOUNT", "300")
gc.set_threshold(100_000)  # collect garbage less often: torch, timm and transformers load a quarter faster
