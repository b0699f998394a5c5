"""Installs jaxlab where it is missing; an installed JAX that jaxlab accepts stays as it is."""

import importlib.metadata as metadata
import importlib.util
import subprocess
import sys


def version_of(package):
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return None


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments], check=True)


accepted = (0, 10) <= (version_of("jax") or (0, 0)) < (0, 13)
if not accepted:
    # JAX and its accelerator plugin must match, so both are upgraded together.
    names = [d.metadata["Name"] for d in metadata.distributions()]
    plugin = next((n.split("-")[1] for n in names if n.startswith("jax-cuda") and n.endswith("-plugin")), None)
    extra = "tpu" if "libtpu" in names else plugin
    pip("-U", f"jax[{extra}]>=0.10.2,<0.13" if extra else "jax>=0.10.2,<0.13")
    print("JAX was upgraded: restart the runtime, then run this cell again")
elif importlib.util.find_spec("jaxlab") is None:
    import pathlib

    clone = next((p for p in (pathlib.Path("."), pathlib.Path("jaxlab")) if (p / "pyproject.toml").exists()), None)
    if clone is None:
        print("Upload a clone of jaxlab beside this notebook (Files, then the folder `jaxlab`) and run this cell again")
    else:
        project = {}
        import tomllib

        with open(clone / "pyproject.toml", "rb") as file:
            project = tomllib.load(file)["project"].get("urls", {})
        source = project.get("Repository")
        pip(f"jaxlab[train] @ git+{source}" if source else f"{clone.resolve()}[train]")
        print("jaxlab is installed")
else:
    print("jaxlab", metadata.version("jaxlab"), "with JAX", metadata.version("jax"))
