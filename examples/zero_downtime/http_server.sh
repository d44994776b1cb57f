#!/bin/sh
# ./http_server.sh VERSION: starts it beside the version that runs, waits until it is ready, then
# stops the old one. No connection is refused, no request fails. A server must run: fdshare serve --detach
set -eu
cd "$(dirname "$0")"
pids=${PID_FILE:-/tmp/zero-downtime.pid}
old=$(cat "$pids" 2>/dev/null || true)

new=$(VERSION=$1 fdshare run --notify --detach "web=${ADDRESS:-tcp://127.0.0.1:8080}" -- \
    python server.py)
echo "$new" >"$pids"

[ -z "$old" ] || kill -TERM "$old"
