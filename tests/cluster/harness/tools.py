"""Programs that the tests need, each built once from pinned Go modules (`go/*/go.mod`).

Where the machine has a helm, kind or kubectl of its own that fits, that one is taken.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

from cluster.harness.cache import ROOT, cached, digest, is_cached
from cluster.harness.errors import HarnessError
from cluster.harness.progress import run_logged, say

MODULES = Path(__file__).parent / "go"
GO_MINIMUM = "1.24"
COMPONENTS = (
    "kube-apiserver",
    "kubectl",
    "kube-controller-manager",
    "kubelet",
    "kubeadm",
    "kube-scheduler",
    "kube-proxy",
)
# What the tests against an API server without nodes need.
API_TOOLS = ("etcd", "kube-apiserver", "kubectl", "kube-controller-manager")


# The module that each folder under `go/` is there for.
MODULES_PINNED = {
    "kubernetes": "k8s.io/kubernetes",
    "etcd": "go.etcd.io/etcd/server/v3",
    "helm": "helm.sh/helm/v3",
    "kind": "sigs.k8s.io/kind",
    "coredns": "github.com/coredns/coredns",
    "local-path": "github.com/rancher/local-path-provisioner",
}

# Programs that may be the machine's own: how to ask for the version, and how many minor versions
# it may be away from the pinned one.
_NEAR_ENOUGH = {
    "helm": (("version", "--short"), 99),
    "kind": (("version",), 3),
    "kubectl": (("version", "--client"), 1),
}


@dataclass(frozen=True)
class Recipe:
    """A Go package, and the folder under `go/` whose go.mod pins it."""

    module: str
    package: str


RECIPES = {
    "etcd": Recipe("etcd", "go.etcd.io/etcd/server/v3"),
    **{name: Recipe("kubernetes", f"k8s.io/kubernetes/cmd/{name}") for name in COMPONENTS},
    "helm": Recipe("helm", "helm.sh/helm/v3/cmd/helm"),
    "kind": Recipe("kind", "sigs.k8s.io/kind"),
    "coredns": Recipe("coredns", "."),
    "pause": Recipe("pause", "."),
    "local-path-provisioner": Recipe("local-path", "github.com/rancher/local-path-provisioner"),
}


def tool(name: str) -> Path:
    """The program of that name, built now if need be (minutes, the first time).

    Raises:
        HarnessError: there is no Go, or it could not be built.
    """
    if found := _of_the_machine(name):
        return found
    recipe = RECIPES[name]
    return cached(name, _inputs(recipe), lambda target: _build(name, recipe, target))


def unavailable(names: Iterable[str]) -> list[str]:
    """Which programs are neither here, as the machine's own or built before, nor can be built."""
    if shutil.which("go") is not None:
        return []
    return [n for n in names if not _of_the_machine(n) and not is_cached(n, _inputs(RECIPES[n]))]


def _inputs(recipe: Recipe) -> str:
    folder = MODULES / recipe.module
    return digest(folder, recipe.package, *_link_flags(recipe.module), os.uname().machine)


def tools(names: Iterable[str]) -> dict[str, Path]:
    """Several programs, one after the other."""
    return {name: tool(name) for name in names}


@once
def version_of(module: str) -> str:
    """The version that a folder's go.mod pins, such as `v1.34.4`."""
    path = MODULES_PINNED[module]
    pinned = (MODULES / module / "go.mod").read_text()
    found = re.search(rf"^(?:require |\t){re.escape(path)} (v\S+)", pinned, re.MULTILINE)
    if found is None:
        raise HarnessError(f"go/{module}/go.mod does not pin {path}", "add it under `require`")
    return found[1]


def _link_flags(module: str) -> tuple[str, ...]:
    """Versions that a release build would link in; what is left out says v0.0.0 or 1.20."""
    _, minor, *_ = version_of("kubernetes").lstrip("v").split(".")
    if module == "kubernetes":
        base = "k8s.io/component-base/version"
        return (
            f"-X {base}.gitVersion={version_of(module)}",
            f"-X {base}.gitMajor=1",
            f"-X {base}.gitMinor={minor}",
        )
    if module == "helm":
        pkg = "helm.sh/helm/v3"
        return (
            f"-X {pkg}/internal/version.version={version_of(module)}",
            *(
                f"-X {pkg}/pkg/{part}.k8sVersion{which}={number}"
                for part in ("chartutil", "lint/rules")
                for which, number in (("Major", "1"), ("Minor", minor))
            ),
        )
    return ()


def _build(name: str, recipe: Recipe, target: Path) -> None:
    if shutil.which("go") is None:
        raise HarnessError(
            f"{name} is built from its Go module, and there is no `go` on PATH",
            f"install Go {GO_MINIMUM} or newer",
        )
    began = time.monotonic()
    version = version_of(recipe.module) if recipe.module in MODULES_PINNED else ""
    say(f"building {name} {version}".rstrip() + f" (minutes, once; kept in {ROOT})")
    log = ROOT / "logs" / f"{name}.log"
    log.unlink(missing_ok=True)
    flags = " ".join(("-s", "-w", *_link_flags(recipe.module)))
    run_logged(
        ["go", "build", "-trimpath", "-ldflags", flags, "-o", target, recipe.package],
        f"building {name}",
        log,
        cwd=MODULES / recipe.module,
        environment={"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"},
    )
    say(f"built {name} in {time.monotonic() - began:.0f} s")


@once
def _of_the_machine(name: str) -> Path | None:
    """The machine's own program, if its version is near enough to the pinned one."""
    found = shutil.which(name)
    if name not in _NEAR_ENOUGH or found is None:
        return None
    arguments, minors = _NEAR_ENOUGH[name]
    said = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)
    has, wants = _major_minor(said.stdout), _major_minor(version_of(RECIPES[name].module))
    if has is None or wants is None or has[0] != wants[0]:
        return None
    return Path(found) if abs(has[1] - wants[1]) <= minors else None


def _major_minor(text: str) -> tuple[int, int] | None:
    found = re.search(r"\bv(\d+)\.(\d+)\.", text)
    return (int(found[1]), int(found[2])) if found else None
