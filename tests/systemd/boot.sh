#!/bin/bash
# boot.sh WORK FOLDER...
#
# Boots this machine's own systemd as PID 1 of a container over a throw-away overlay of this machine's own /, with
# no network but lo, and has it run WORK/inside as root when basic.target is reached. Powers off when that ends;
# WORK/journal.txt is its log then. In the container WORK is /mnt/work, /usr/bin/fdshare is WORK/fdshare, and the
# FOLDERs, which / does not show, are throw-away copies, too.
#
# Needs root, and systemd-nspawn, unshare and a cgroup2 that may be written to.
set -eu
work=$1
shift
export work
cat > "$work/fdshare-test.target" <<'X'
[Unit]
Requires=basic.target fdshare-test.service
After=basic.target
X
cat > "$work/fdshare-test.service" <<'X'
[Unit]
DefaultDependencies=no
Wants=dbus.socket
After=basic.target dbus.socket
[Service]
Type=exec
KillMode=process
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/bin/bash -c 'install -m755 /mnt/work/fdshare /usr/bin/fdshare; exec /mnt/work/inside > /mnt/work/console.txt 2>&1'
ExecStopPost=/bin/bash -c 'journalctl -b -o short-precise --no-pager > /mnt/work/journal.txt; systemctl poweroff --force --no-block'
X
# A group of its own, for each of several boots at once; who kills this script kills the group, too.
mount=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)
export group=$mount$(sed -n 's/^0:://p' /proc/self/cgroup)/fdshare-test-$$
mkdir "$group"
trap 'find "$group" "$mount/../systemd/${group##*/}" -depth -type d -exec rmdir {} + 2>/dev/null' EXIT
# A mount namespace of its own: nspawn wants a tmpfs on /run, and does not take / itself for a root.
unshare -m bash -c '
  echo $$ > "$group/cgroup.procs"
  mount -t tmpfs tmpfs /run; mkdir /run/root; mount --bind / /run/root
  binds=()
  for folder; do
    layers=/run/layers/${#binds[@]}
    mkdir -p "$layers"/{upper,work,merged}
    mount -t overlay -o "lowerdir=$folder,upperdir=$layers/upper,workdir=$layers/work" overlay "$layers/merged"
    binds+=(--bind="$layers/merged:$folder")
  done
  export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_LOCK=0
  exec systemd-nspawn --quiet --boot --volatile=overlay --register=no --keep-unit --private-network --link-journal=no \
    --directory=/run/root --machine="${group##*/}" --console=pipe --bind="$work":/mnt/work "${binds[@]}" \
    --bind-ro="$work/fdshare-test.target":/etc/systemd/system/fdshare-test.target \
    --bind-ro="$work/fdshare-test.service":/etc/systemd/system/fdshare-test.service \
    systemd.unit=fdshare-test.target systemd.show_status=0' bash "$@" < /dev/null > "$work/nspawn.txt" 2>&1
