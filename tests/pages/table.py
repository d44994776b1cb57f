"""How each code block of each page is run, in the order of the page."""

from __future__ import annotations

from typing import Final

from pages.runs import NUMBERS, NotRun, Run

# An application that answers, for the servers that the pages name.
APP: Final = r"""
printf 'def app(environ, start):\n    start("200 OK", [])\n    return [b"hello\\n"]\n' >app.py
"""
HELLO: Final = "$ ask 8080\nhello\n"
INSTALLS: Final = "needs a package index; .ci/run does the same"
SYSTEMD: Final = "tests/systemd does this, in a container that boots"
DOCKER: Final = "needs Docker; the other commands are what it would run"
EXAMPLE: Final = "cp -r $EXAMPLES/classic . && cd classic"

README: Final = [
    Run(),
    Run(file="listener.py", command="python listener.py"),
    Run(file="worker.py", command="python worker.py", forever=("python",), then=HELLO),
    Run(forever=("python",), then="$ ask 8081 ''\nhello\n"),
    Run(apart={"python3 -m venv": INSTALLS, ". .venv": INSTALLS, "pip": INSTALLS}),
    NotRun("it is this"),
    Run(
        given="mkdir -p /run/user/1000",
        around="""
            import socket, subprocess
            import fdshare

            connection, other = socket.socketpair()
            job = "soon fdshare register jobs/17 --path /run/user/1000/app.sock --open /dev/null"
            subprocess.Popen(job.split())
            BLOCK
        """,
        forever=("python",),
        then="$ soon grep -o Snapshot .job0\nSnapshot\n",
        # The job may have been registered before it, and have the generation 1.
        says="Snapshot(entries={'db/primary': ...}, serial=4, reason='start')",
    ),
    Run(given=f"fdshare rm web\n{APP}", needs=("gunicorn",), then=HELLO),
]

AUDIT: Final = [
    Run(
        forever=("fdshare serve",),
        each=True,
        then="$ soon fdshare ls\n...\n$ fdshare ls -q\n",
    )
]

COMPAT: Final = [NotRun("takes minutes; tests/compat/test_suites.py runs a part")]

POLICY: Final = [
    Run(
        # 1000 may be free, and bob must not get it: alice is of the page.
        given="groupadd deploy\n"
        "useradd --uid 61001 --non-unique -G deploy bob\n"
        "useradd --uid 1000 --non-unique alice",
        needs=("root",),
    ),
    Run(),
    Run(),
    Run(
        around="import fdshare\nBLOCK\nprint(listener.getsockname())",
        says="('0.0.0.0', 80)",
        command="sudo -u alice python program.py",
    ),
    Run(
        then="""
$ fdshare reload --path /run/fdshare.sock
...
$ fdshare explain fetch web/http --uid bob --path /run/fdshare.sock
...
$ fdshare explain fetch web/private/key --uid bob --path /run/fdshare.sock  # status 1
...
$ fdshare explain take web/http --uid bob --path /run/fdshare.sock  # status 1
...
$ sudo -u bob fdshare ls -q --path /run/fdshare.sock
web/http
"""
    ),
    Run(
        around="import fdshare\nclient = fdshare.connect('/run/fdshare.sock')\nBLOCK",
        says="Explained(allowed=True, rule='rule 1 (alice serves the web)')",
    ),
    NotRun("tests/server/core/test_policy_file.py has this message"),
]

# A program that has what the parts of docs/howto/asyncio.md use; they print nothing by themselves.
PART: Final = """
import asyncio
import fdshare.aio

def serve_exactly(held):
    if "web/2" in held:
        print(held)
        raise SystemExit

async def main():
    async with fdshare.aio.connect() as rendezvous:
        PART

asyncio.run(main())
"""

ASYNCIO: Final = [
    Run(
        given="fdshare serve --detach",
        forever=("python",),
        then="$ ask 8080 hello\nhello\n",
    ),
    Run(
        around="""
            import asyncio
            import fdshare.aio

            BLOCK

            async def main():
                global rendezvous, name
                name = "passed"
                async with fdshare.aio.connect() as rendezvous:
                    server = await asyncio.start_server(pass_on, "127.0.0.1", 8082)
                    reader, writer = await asyncio.open_connection("127.0.0.1", 8082)
                    writer.write(b"sixteen bytes...")
                    with await rendezvous.take(name, timeout=20) as connection:
                        writer.write(b"the rest")
                        print(connection.recv(99))
                        connection.sendall(b"from the next owner")
                    print(await reader.read())
                    writer.close()
                    server.close()

            asyncio.run(main())
        """,
        says="b'the rest'\nb'from the next owner'",
    ),
    Run(
        around=PART.replace("PART", "BLOCK\n        print(sock.family.name, entry)"),
        says="AF_INET Registered(...)",
    ),
    Run(
        given="echo >watched",
        around=PART.replace("PART", "BLOCK"),
        forever=("python",),
        then="""
$ soon grep snapshot .job0
snapshot {}
$ fdshare register web/1 --open watched
...
$ soon grep web/1 .job0
registered {'web/1': ...}
""",
    ),
    Run(
        around=PART.replace(
            "PART",
            """async with rendezvous.watch() as watch:
            await rendezvous.register("web/2", open("watched"))
            BLOCK""",
        ),
        says="...'web/2'...",
    ),
]

# A part of a program with a name that is held, and a function that gets its descriptor.
SHARED: Final = """
import os, tempfile
import fdshare

if __name__ == "__main__":
    with tempfile.TemporaryFile() as file:
        file.write(b"data")
        fdshare.connect().register("dataset", file, replace=True)
BLOCK
"""

CLUSTER: Final = [
    Run(
        given="fdshare serve --detach",
        around="""
            import os, tempfile
            import fdshare

            with tempfile.TemporaryFile() as file:
                file.write(b"data")
                fdshare.connect().register("dataset", file)
            BLOCK
            task(reference)
        """,
    ),
    Run(
        around="""
            import os, socket
            import fdshare

            def serve(listener):
                return listener.getsockname()[0]

            if __name__ == "__main__":
                fdshare.connect().bind("web", "tcp://127.0.0.1:0")
                with fdshare.ProcessPoolExecutor(1) as pool:
                    future = \\
                    BLOCK
                    print(future.result())
        """,
        says="127.0.0.1",
    ),
    NotRun("tests/examples/test_async_examples.py runs the program"),
    Run(
        around="""
            import tempfile
            from types import SimpleNamespace
            import fdshare

            WorkerPlugin = SimpleNamespace if False else object

            def download(source):
                file = tempfile.TemporaryFile()
                file.write(source)
                return file

            BLOCK
            fdshare.connect().unregister("dataset")
            first, second = Dataset(b"of the first"), Dataset(b"of the second")
            for worker in (first, second):
                worker.setup(None)
                worker.file.seek(0)
                print(worker.file.read())
                worker.teardown(None)
        """,
        says="b'of the first'\nb'of the first'",
    ),
]

CONTAINERS: Final = [
    NotRun(DOCKER),
    Run(given="groupadd -f docker", apart={"docker run": DOCKER}, needs=("root",)),
    Run(
        given="fdshare stop --path /run/fdshare/fdshare.sock\nfdshare serve --detach",
        around="""
            import tempfile
            connection = tempfile.TemporaryFile()
            BLOCK
            print(sorted(passed))
        """,
        file="app.py",
        command="",
    ),
    Run(
        then="""
$ fdshare run --notify web=tcp://0.0.0.0:8080 -- python app.py
['session', 'web']
$ fdshare ls -q
web
web/session
web/session:2
""",
    ),
    Run(apart={"python -m pytest": "it is this"}),
]

DEBUGGING: Final = [
    Run(
        given=f"""{APP}
fdshare serve --detach
fdshare run web=tcp://127.0.0.1:8080 -- gunicorn app:app 2>/dev/null &
ask 8080
""",
        varies=(r"\d+[smh]\b", NUMBERS, r"\S*bin/python\S* \S*bin/"),
        needs=("gunicorn",),
    ),
    Run(),
    Run(
        forever=("fdshare watch",),
        apart={"fdshare top": "needs a terminal; tests/cli/commands/test_top.py has one"},
    ),
]

DEPLOY: Final = [
    Run(given=APP, needs=("gunicorn",), then=HELLO),
    Run(
        given="over web",
        forever=("fdshare run",),
        ended=(0,),
        before={"kill": "ask 8080; pid_of_version_1=$job0"},
        then=HELLO,
    ),
    Run(forever=("fdshare run",), given="over web\nfdshare serve --detach", then=HELLO),
    Run(
        given="""
over web
fdshare serve --detach
old=$(fdshare run --notify --detach web=tcp://127.0.0.1:8080 -- gunicorn app:app)
""",
        then=HELLO,
    ),
]

ARRAYS: Final = [
    Run(says="1999998.0", needs=("numpy",)),
    Run(says="[   0. 1000. 2000. 3000.]", needs=("numpy",)),
    Run(says="[249.5, 749.5]", needs=("numpy",)),
    Run(says="8000000.0", needs=("numpy",)),
    Run(file="publish.py", command="", needs=("numpy",)),
    Run(file="read.py", command="", needs=("numpy",)),
    Run(needs=("numpy",), varies=(r"\S+data.sock", r"pid \d+")),
]

POOLS: Final = [
    Run(says="27 characters"),
    Run(says="from a worker"),
    Run(says="127.0.0.1"),
    Run(says="loky alone leaks 9 of 9\nheld leaks 0 of 9", needs=("loky",)),
    Run(says="leaks 0 of 5", needs=("loky",)),
    Run(says="abc def ghi", needs=("joblib",)),
]

PORTS: Final = [
    Run(),
    Run(),
    Run(given=APP, forever=("sudo",), then="$ ask 80\nhello\n", needs=("gunicorn", "root")),
    Run(),
]

TUTORIAL: Final = [
    Run(file="hello.py", command=""),
    Run(file="ask.py", command=""),
    Run(),
    Run(),
    Run(),
    Run(),
    Run(file="pool.py", command=""),
    Run(),
    Run(file="write.py", command=""),
    Run(),
    Run(),
]

UNITS: Final = [
    NotRun(SYSTEMD),
    NotRun(SYSTEMD),
    NotRun(SYSTEMD),
    Run(
        given="fdshare serve --detach",
        around="BLOCK\nprint(sorted(passed), web.getsockname())",
        command="fdshare run web=tcp://127.0.0.1:8080 -- python program.py",
        says="['web'] ('127.0.0.1', 8080)",
    ),
    Run(
        given="mkdir -p /run/user/$UID",
        forever=("systemd-socket-activate",),
        then="$ fdshare ls --path /run/user/$UID/fdshare.sock\n...",
        apart={"systemd-analyze": "tests/examples/test_contrib.py does it for each unit"},
    ),
]

FOLLOW: Final = [
    Run(
        given="fdshare serve --detach\nfdshare register log --open app.log --mode ab",
        around="import os\nBLOCK\nprint(open('app.log').read())",
        says="a line",
    ),
    Run(says="1 False"),
    Run(
        around=PART.replace("PART", "BLOCK"),
        then="$ cat app.log\na line\nbegun here, and ended here\na line\n",
    ),
]

FRAMEWORKS: Final = [
    Run(file="main.py", command="", needs=("fastapi", "uvicorn")),
    Run(then='$ ask 8080\n"hello"\n'),
    Run(file="app.py", command="", given="over web; rm main.py", needs=("flask", "gunicorn")),
    Run(then=HELLO),
    Run(given="over web", then="$ ask 8080\n...</html>\n", needs=("django", "gunicorn")),
    Run(file="serve.py", command="", given="over web", needs=("aiohttp",)),
    Run(then=HELLO),
    Run(file="tasks.py", command="", given="over web", needs=("celery",)),
    Run(forever=("celery",), stays=True),
    Run(file="ask.py", command="python ask.py", says="one open file for all workers"),
]

OPERATIONS: Final = [
    NotRun("needs Ansible; tests/examples/test_contrib.py parses the commands of the file"),
    Run(needs=("supervisor",), given="cp $EXAMPLES/../contrib/supervisord/fdshare.conf ."),
    Run(
        given=APP,
        before={"supervisorctl": "ask 8080"},
        then=f"{HELLO}$ supervisorctl -c supervisord.conf shutdown\n...\n",
    ),
    Run(
        given="while [ -e /run/supervisor.sock ]; do sleep 0.1; done",
        forever=("fdshare serve",),
        then="$ soon sh -c 'curl -sf http://127.0.0.1:9100/metrics | grep -c ^fdshare_names'\n1\n",
    ),
    Run(given="fdshare serve --detach\nmkdir -p /var/lib/node_exporter", then="$ fdshare stop\n"),
    Run(file="writer.py", command=""),
    Run(),
    Run(
        before={"mv": "soon grep -q line /var/log/app.log"},
        then="$ soon grep -q line /var/log/app.log\n$ zcat /var/log/app.log.1 | head -n 1\na line",
    ),
    NotRun("needs logrotate, as root, with its own state; the command is the one above"),
]

COMING: Final = [
    Run(says="127.0.0.1"),
    Run(says="127.0.0.1"),
    Run(says="127.0.0.1"),
    Run(),
    Run(given="fdshare rm web", file="server.py", command=""),
    Run(),
]

PAGES: Final[dict[str, list[Run | NotRun]]] = {
    "README.md": README,
    "CONTRIBUTING.md": [NotRun(INSTALLS)],
    "docs/audit.md": AUDIT,
    "docs/compat.md": COMPAT,
    "docs/design.md": [NotRun("a list of files")],
    "docs/performance.md": [NotRun("takes five minutes; tests/test_benchmarks.py has it quicker")],
    "docs/policy.md": POLICY,
    "docs/reliability.md": [NotRun("the other suites of tests")],
    "docs/howto/arrays.md": ARRAYS,
    "docs/tutorial.md": TUTORIAL,
    "docs/howto/asyncio.md": ASYNCIO,
    "docs/howto/cluster.md": CLUSTER,
    "docs/howto/coming-from.md": COMING,
    "docs/howto/containers.md": CONTAINERS,
    "docs/howto/debugging.md": DEBUGGING,
    "docs/howto/deploy.md": DEPLOY,
    "docs/howto/follow.md": FOLLOW,
    "docs/howto/operations.md": OPERATIONS,
    "docs/howto/pools.md": POOLS,
    "docs/howto/privileged-ports.md": PORTS,
    "docs/howto/systemd.md": UNITS,
    "docs/howto/web-frameworks.md": FRAMEWORKS,
    "docs/platforms.md": [NotRun("the suite itself, with other Pythons")],
}
