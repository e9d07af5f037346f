import os

__version__ = "0.1.0"
os.environ.setdefault("GOMP_SPINCOUNT", "300")  # torch's threads sleep while they wait: said before torch is loaded, see 00_core
