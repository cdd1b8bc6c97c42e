#!/bin/sh
# The first process of AnyKVM's default guest. It brings up devices, disk and network, runs the
# shell or the command that the host asked for, reports how it ended, and powers off.
#
# It is made to be fast: a busybox built-in where one exists, no program that is not needed, and
# the wait for the network runs beside the rest.

export PATH=/usr/local/sbin:/usr/local/bin:/sbin:/bin:/usr/sbin:/usr/bin HOME=/root

[ -e /bin/ls ] || /bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir /dev/pts && mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd

# What this start is about: TERM_NAME, CONSOLE, CONTROL,
# SCRATCH, NET, ROWS, COLS, COMMAND, IN, OUT, ERR, HOST_NAME.
. /anykvm/config
export TERM=$TERM_NAME
hostname "$HOST_NAME"

while read -r module; do
    insmod "/lib/modules/$module"
done </lib/modules/order

# find_device NAME: sets REPLY to the device NAME, a path or "port:P" for the virtio port called P.
# Ports appear a moment after their driver is loaded, when the host has named them.
find_device() {
    case $1 in
    port:*)
        for attempt in 1 2 3 4 5 6 7 8 9 10; do
            for REPLY in /sys/class/virtio-ports/*; do
                [ -e "$REPLY/name" ] && read -r name <"$REPLY/name" && [ "port:$name" = "$1" ] || continue
                REPLY=/dev/${REPLY##*/}
                return 0
            done
            usleep 20000
        done
        return 1
        ;;
    *)
        REPLY=$1
        [ -c "$REPLY" ]
        ;;
    esac
}

ip link set lo up
network=
if [ "$NET" = dhcp ] && [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -i eth0 -f -n -q -t 8 -T 1 -s /etc/udhcpc.script >/dev/null 2>&1 &
    network=$!
fi

if [ -n "$SCRATCH" ]; then
    mount -t ext4 "$SCRATCH" /mnt
fi

[ -n "$CONTROL" ] && find_device "$CONTROL" && exec 3>"$REPLY"
report() {
    echo "$*" >&3
} 2>/dev/null

# The network is there when the prompt is, or it has had its time.
[ -n "$network" ] && wait "$network"
cd /root
[ -n "$ROWS" ] && stty rows "$ROWS" cols "$COLS" <"$CONSOLE"
report ready

if [ -z "$COMMAND" ]; then
    setsid -c sh -l <"$CONSOLE" >"$CONSOLE" 2>&1 3>&-
    status=$?
elif [ -z "$OUT" ]; then
    setsid -c sh /anykvm/command <"$CONSOLE" >"$CONSOLE" 2>&1 3>&-
    status=$?
elif find_device "$IN" && in=$REPLY && find_device "$OUT" && out=$REPLY && find_device "$ERR"; then
    setsid sh /anykvm/command <"$in" >"$out" 2>"$REPLY" 3>&-
    status=$?
else
    status=125
    report "failed the guest has no device for the command's output"
fi

report "exit $status"
umount -a -r 2>/dev/null
poweroff -f
