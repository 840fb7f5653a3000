"""Command lines that start a jail: bubblewrap, or Linux namespaces made with util-linux."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from quantkit.evaluate.sandbox.limits import SCRATCH_BYTES, SCRATCH_FILES

NOBODY = 65534
# not /dev/zero: a shared mapping of it is memory that no limit counts
DEVICES = ("/dev/null", "/dev/urandom")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_NAMESPACES_SCRIPT = """set -eu
mount -t tmpfs -o size={scratch},nr_inodes={files},mode=755,nosuid,nodev tmpfs /tmp
cd /tmp
mkdir dev tmp
chmod 1777 tmp
{binds}
while read -r _ _ _ _ point _; do
case $point in {submounts}) mount -o remount,bind,ro,nosuid,nodev "$point";; esac
done </proc/self/mountinfo
{hides}
for device in {devices}; do : >.$device; mount --bind $device .$device; done
exec chroot . {setpriv} --no-new-privs --inh-caps=-all --bounding-set=-all \
 /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp LANG=C.UTF-8 {python} -I -S -c "$@"
"""


def list_interpreters() -> list[str]:
    """Return interpreters to try: the system's, then the base of quantkit's environment."""
    own = str(Path(sys.base_prefix) / "bin" / "python3")
    return [python for python in dict.fromkeys(("/usr/bin/python3", own)) if Path(python).exists()]


def build_bubblewrap_command(path: str, python: str) -> tuple[str, ...] | str:
    """Return the command that starts a bubblewrap jail, or the reason why there is none."""
    program, prefix = shutil.which("bwrap", path=path), _build_setpriv_prefix(path)
    if program is None:
        return "bwrap is not installed"
    if isinstance(prefix, str):
        return prefix
    binds = [part for folder in _list_folders(python) for part in ("--ro-bind", folder, folder)]
    for name, target in _find_root_links().items():
        binds += ["--symlink", target, name] if target else ["--ro-bind", name, name]
    for folder in _list_hidden_folders(python):
        binds += ["--size", "4096", "--tmpfs", folder, "--remount-ro", folder]
    # --dev would add a /dev/shm without a size limit
    for device in DEVICES:
        binds += ["--dev-bind", device, device]
    environment = (
        *("--clearenv", "--setenv", "PATH", "/usr/bin:/bin"),
        *("--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
    )
    return (
        *(*prefix, program, "--unshare-all", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL", *environment, *binds),
        *("--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/"),
        *("--chdir", "/tmp", python, "-I", "-S", "-c"),
    )


def build_namespaces_command(path: str, python: str) -> tuple[str, ...] | str:
    """Return the command that starts a jail of namespaces, or the reason why there is none."""
    names = ("unshare", "mount", "chroot", "setpriv", "sh")
    tools = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name, tool in tools.items() if tool is None]
    prefix = _build_setpriv_prefix(path)
    if missing:
        return f"{', '.join(missing)} not found (util-linux and coreutils have them)"
    if isinstance(prefix, str):
        return prefix
    bind = "mount --rbind -o ro,nosuid,nodev"
    folders = [shlex.quote(folder) for folder in _list_folders(python)]
    binds = [f"mkdir -p .{folder}; {bind} {folder} .{folder}" for folder in folders]
    for name, target in _find_root_links().items():
        binds.append(
            f"ln -s {target} .{name}" if target else f"mkdir .{name}; {bind} {name} .{name}"
        )
    hides = [
        f"mount -t tmpfs -o ro,size=4k,nr_inodes=2 tmpfs .{shlex.quote(folder)}"
        for folder in _list_hidden_folders(python)
    ]
    roots = [*folders, *_find_root_links()]
    script = _NAMESPACES_SCRIPT.format(
        scratch=SCRATCH_BYTES,
        files=SCRATCH_FILES,
        binds="\n".join(binds),
        # a recursive bind makes only its topmost mount read-only
        submounts="|".join(f"/tmp{root}/*" for root in roots),
        hides="\n".join(hides),
        devices=" ".join(DEVICES),
        setpriv=shlex.quote(str(tools["setpriv"])),
        python=shlex.quote(python),
    )
    return (
        *(*prefix, str(tools["unshare"]), "--user", "--map-root-user", "--net", "--mount", "--pid"),
        *("--fork", "--ipc", "--uts", "--kill-child", "--"),
        *(str(tools["sh"]), "-c", script, "jail"),
    )


def _build_setpriv_prefix(path: str) -> list[str] | str:
    """Return a prefix that keeps a command from running as root, or why there is none."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv", path=path)
    if setpriv is None:
        return "setpriv is missing, and a jail started by root would not limit processes"
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def _list_folders(python: str) -> list[str]:
    """Return the host's folders that an interpreter needs, without the links at the root."""
    if python.startswith("/usr/"):
        return ["/usr"]
    # a prefix may hold much else, such as the environments and packages of conda
    parts = [str(Path(sys.base_prefix, name)) for name in ("bin", "lib", "lib64")]
    return ["/usr", *(part for part in parts if Path(part).is_dir())]


def _list_hidden_folders(python: str) -> list[str]:
    """Return the folders below those that stay empty in a jail: software of the host.

    A program sees the standard library alone, so that its verdict does not depend on the host.
    """
    hidden = [] if python.startswith("/usr/local/") else [Path("/usr/local")]
    for prefix in (Path("/usr"), Path("/usr/local"), Path(sys.base_prefix)):
        hidden += prefix.glob("lib*/python3*/*-packages")
    bound = [Path(folder) for folder in _list_folders(python)]
    resolved = dict.fromkeys(folder.resolve() for folder in hidden if folder.is_dir())
    return [
        str(folder)
        for folder in resolved
        if any(folder.is_relative_to(root) for root in bound)
        and not any(other != folder and folder.is_relative_to(other) for other in resolved)
    ]


def _find_root_links() -> dict[str, str | None]:
    """Return /bin, /lib, ... -> target of the link (merged /usr), None for a real folder."""
    paths = [Path(name) for name in ("/bin", "/sbin", "/lib", "/lib64") if Path(name).exists()]
    return {str(path): os.readlink(path) if path.is_symlink() else None for path in paths}
