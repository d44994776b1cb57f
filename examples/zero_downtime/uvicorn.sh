#!/bin/sh
# ./uvicorn.sh VERSION: starts it beside the version that runs, waits until it is ready, then stops
# the old one. No connection is refused. A server must run: fdshare serve --detach
set -eu
cd "$(dirname "$0")"
pids=${PID_FILE:-/tmp/zero-downtime.pid}
old=$(cat "$pids" 2>/dev/null || true)

new=$(VERSION=$1 fdshare run --notify --detach "web=${ADDRESS:-tcp://127.0.0.1:8080}" -- \
    uvicorn --fd '{web}' --loop asyncio --log-level warning app:asgi)
echo "$new" >"$pids"

if [ -n "$old" ]; then
    # uvicorn would close what it has accepted and not read yet: have it accept no more first.
    if [ "${DRAIN:-yes}" = yes ]; then
        kill -USR1 "$old"
        sleep 1
    fi
    kill -TERM "$old"
fi
