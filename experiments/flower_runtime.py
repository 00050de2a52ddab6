"""An experiment in Flower's own runtime, on this machine: a simulation, or a deployment with TLS. Starts and ends all.

    python experiments/flower_runtime.py simulation EXPERIMENT [--set KEY=VALUE ...] [--out DIR]
    python experiments/flower_runtime.py deployment EXPERIMENT [--set KEY=VALUE ...] [--out DIR]
    python experiments/flower_runtime.py deployment --resume RUN_DIR

The digest is compared with the local engine's under ``--compare``. ``--kill-after 2`` kills all processes by SIGKILL,
the nodes' too, once two checkpoints are there, and goes on with new ones. Exit code 0; 1 if the digests differ; 2 for a
run that failed.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsparse.data import federate, load_dataset
from fedsparse.errors import UserError
from fedsparse.experiment import Experiment, load_experiment, toml_text
from fedsparse.runner import run

PROJECT = Path(__file__).resolve().parents[1]
HOST, LINK = "127.0.0.1", "here"
START_SECONDS, END_SECONDS = 60.0, 10.0
KINDS = ("simulation", "deployment")


class Runtime:
    """A SuperLink, and for a deployment a SuperNode a client with TLS between all; use it as a context manager.

    nodes: of a deployment; 0 = a simulation. place: the folder from which all start. None = an empty one: what lies
    there comes before the app's own files in a simulation's clients.
    """

    def __init__(self, nodes: int = 0, place: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedsparse-flower-"))
        self._nodes = nodes
        self._place = place or self.folder / "empty"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = _free_port()
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / "home"),  # beside other people's
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # what is installed here is used
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_worker_niceness": "0",  # else a busy machine starves the clients of a simulation
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Runtime:
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_all(self) -> None:
        address, config = f"{HOST}:{self._port}", self.folder / "home" / "config.toml"
        config.parent.mkdir()
        if not self._nodes:
            link: dict[str, Any] = {"address": address, "insecure": True}
            self._start("superlink", "flower-superlink", "--insecure", "--simulation", *_at(self._port))
        else:
            ca, cert, key = certificates(self.folder)
            link = {"address": address, "root-certificates": str(ca)}
            tls = ("--ssl-ca-certfile", str(ca), "--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
            self._start("superlink", "flower-superlink", *tls, *_at(self._port))
        config.write_text(toml_text({"superlink": {"default": LINK, LINK: link}}))
        self._wait_for("superlink", self._port)
        for i in range(self._nodes):
            who = ("--superlink", address, "--root-certificates", str(ca), *tls)
            node = f"partition-id={i} num-partitions={self._nodes}"
            self._start(f"supernode{i}", "flower-supernode", *who, *_at(_free_port()), "--node-config", node)

    def _start(self, name: str, *command: str) -> None:
        self._place.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                cwd=self._place,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_for(self, name: str, port: int) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._processes[name].poll() is None:
            try:
                socket.create_connection((HOST, port), 1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise UserError(f"the {name} did not start: {self.log(name)}")

    def log(self, name: str) -> str:
        """The end of what a process wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]

    def run(self, config: Mapping[str, Any], nodes: int = 0, *, show: bool = False) -> tuple[str, str]:
        """Run the project with this run config, on ``nodes`` simulated ones; returns Flower's status and its details.

        show: the run's log lines on standard output.
        """
        file = self.folder / "run.toml"
        file.write_text(toml_text(config))
        simulated = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-logging-level='ERROR'"
        federation = ("--federation-config", simulated) if nodes else ()
        started = self._flwr("run", str(PROJECT), LINK, "--run-config", str(file), *federation, "--format", "json")
        run_id = str(json.loads(started)["run-id"])
        self._flwr("log", run_id, LINK, "--stream", show=show)
        while True:  # the exit code says nothing of how the run ended
            found = json.loads(self._flwr("ls", LINK, "--run-id", run_id, "--format", "json"))["runs"][0]
            if found["status"].startswith("finished"):
                return found["status"], found["status-details"] or ""
            time.sleep(0.5)

    def _flwr(self, *arguments: str, show: bool = False) -> str:
        done = subprocess.run(
            ["flwr", *arguments],
            env=self._environment,
            stdout=None if show else subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout or '').strip()[-2000:]}")
        return done.stdout or ""

    def kill(self) -> None:
        """SIGKILL to all processes, those that they have started too. Nothing else is done: ``close`` comes after."""
        for process in self._processes.values():
            process.kill()
        while left := self._left():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def close(self) -> None:
        """End all processes, those that they have started too, and delete the folder."""
        for process in reversed(self._processes.values()):
            process.terminate()
        end = time.monotonic() + END_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        while (left := self._left()) and time.monotonic() < end:  # Ray's end by themselves, a little later
            time.sleep(0.1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _left(self) -> list[int]:
        """What the runtime's processes have started and is alive, in any session: all inherit the environment."""
        mark, found = f"FLWR_HOME={self._environment['FLWR_HOME']}".encode(), []
        for place in Path("/proc").glob("[0-9]*"):  # none on systems without it
            with suppress(OSError):
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
        return found


def _at(port: int) -> tuple[str, ...]:
    return "--host", HOST, "--port", str(port)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """An authority for a day, and a certificate by it for this machine's loopback: files of both, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def signed(name: str, key: Any, issuer: str, by: Any, authority: bool) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        made = x509.CertificateBuilder(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]),
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
            key.public_key(),
            x509.random_serial_number(),
            now - datetime.timedelta(minutes=5),
            now + datetime.timedelta(days=1),
        )
        made = made.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
        if not authority:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca, cert, private = (folder / name for name in ("ca.pem", "server.pem", "server.key"))
    ca.write_bytes(signed("fedsparse", authority_key, "fedsparse", authority_key, True))
    cert.write_bytes(signed("server", key, "fedsparse", authority_key, False))
    private.touch(mode=0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return ca, cert, private


def clients_of(experiment: Experiment) -> int:
    """How many clients the experiment has, which its data may decide."""
    return len(federate(load_dataset(experiment.dataset), experiment.partition, experiment.seed).clients)


def begin(kind: str, experiment: Experiment, out: Path, *, kill_after: int = 0, show: bool = False) -> str:
    """An experiment in Flower's runtime of this kind, into the run folder ``out``; returns the digest.

    kill_after: all processes are killed once the checkpoint after so many lines of ``rounds.jsonl`` is there; "" is
    returned. 0 = they are not. Raises UserError for a run that failed.
    """
    if out.exists():
        raise UserError(f"output folder {str(out)!r} exists; name another or remove it")
    with tempfile.TemporaryDirectory(prefix="fedsparse-") as temporary:
        file, clients = Path(temporary) / "experiment.toml", clients_of(experiment)
        file.write_text(experiment.to_toml())
        config = {"experiment": str(file), "out": str(out.absolute())}
        if not kill_after:
            return _done(kind, config, clients, out, show)
        nodes = (clients, 0) if kind == "deployment" else (0, clients)
        with ThreadPoolExecutor(1) as pool, Runtime(nodes[0]) as runtime:
            running = pool.submit(runtime.run, config, nodes[1])
            while not checkpoint_after(out, kill_after):
                if running.done():
                    raise UserError(f"the run was over before it could be killed: {': '.join(running.result())}")
                time.sleep(0.02)
            runtime.kill()  # and the thread's command, which fails
    if (out / "summary.json").exists():
        raise UserError("the run was over before it could be killed: give it more rounds")
    return ""


def go_on(kind: str, folder: Path, *, show: bool = False) -> str:
    """Go on with the run in a folder in Flower's runtime of this kind; returns the digest."""
    if not (folder / "config.toml").is_file():
        raise UserError(f"{str(folder)!r} is no run folder: it has no config.toml")
    clients = clients_of(load_experiment(folder / "config.toml"))
    return _done(kind, {"resume": str(folder.absolute())}, clients, folder, show)


def checkpoint_after(folder: Path, reports: int) -> bool:
    """Whether a checkpoint after so many lines of ``rounds.jsonl`` is there."""
    return any(int(path.name) >= reports for path in (folder / "checkpoint").glob("[0-9]*"))


def _done(kind: str, config: Mapping[str, str], clients: int, folder: Path, show: bool) -> str:
    """The digest of a run in a new runtime, to its end."""
    deployment = kind == "deployment"
    if show:
        print(f"== Flower: {kind} with {clients} {'SuperNodes' if deployment else 'simulated clients'}", flush=True)
    with Runtime(clients if deployment else 0) as runtime:
        status, details = runtime.run(config, 0 if deployment else clients, show=show)
    if status != "finished:completed":
        raise UserError(f"{status}: {details}")
    return str(json.loads((folder / "summary.json").read_text())["digest"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("experiment", nargs="?", default="")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="the run folder; without it the run is not kept")
    parser.add_argument("--compare", action="store_true", help="run it on the local engine too")
    parser.add_argument("--kill-after", type=int, default=0, metavar="N", help="checkpoints, one a round; 0 = never")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with this run; nothing else is given")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedsparse-") as temporary:
        try:
            return _run(args, Path(temporary))
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def _run(args: argparse.Namespace, temporary: Path) -> int:
    if bool(args.resume) == bool(args.experiment):
        raise UserError("give an experiment, or --resume with the folder of a run, one of both")
    if args.resume:
        if args.set or args.out or args.compare or args.kill_after:
            raise UserError("--resume goes on with a run as it was begun: leave all other options out")
        print(f"digest {go_on(args.kind, args.resume, show=True)}")
        return 0
    checkpoints = ["engine.checkpoint_every=1"] if args.kill_after else []
    experiment = load_experiment(args.experiment, [*args.set, *checkpoints])
    local = ""
    if args.compare:
        print("== the local engine", flush=True)
        local = run(experiment, out=temporary / "local").summary["digest"]
        experiment = load_experiment(temporary / "local" / "config.toml")  # with what was measured
    out = (args.out or temporary / "flower").absolute()
    digest = begin(args.kind, experiment, out, kill_after=args.kill_after, show=True)
    if args.kill_after:
        print("== Flower: all processes are killed; new ones go on", flush=True)
        digest = go_on(args.kind, out, show=True)
    print(f"digest {digest}" + (f", run folder: {out}" if args.out else ""))
    if local:
        print("the local engine's is the same" if local == digest else f"the local engine's differs: {local}")
    return int(bool(local) and local != digest)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended
    sys.exit(main())
