"""One full-duplex pipe, two processes, half a greeting from each.

    $ python hello_pipe.py
    child 4243 received 'hello, ' and answers
    parent 4242 received 'world!'
    hello, world!

Unlike the ends of os.pipe(), both ends of s_pipe() read and write, and they carry descriptors.
"""

import os

from fdshare.kernel import s_pipe


def main() -> None:
    parent_end, child_end = s_pipe()
    pid = os.fork()
    if pid == 0:
        parent_end.close()
        with child_end:
            greeting = child_end.recv(100)
            print(f"child {os.getpid()} received {greeting.decode()!r} and answers", flush=True)
            child_end.sendall(b"world!")
        os._exit(0)

    child_end.close()
    with parent_end:
        parent_end.sendall(b"hello, ")
        answer = parent_end.recv(100)
    os.waitpid(pid, 0)
    print(f"parent {os.getpid()} received {answer.decode()!r}")
    print("hello, " + answer.decode())


if __name__ == "__main__":
    main()
