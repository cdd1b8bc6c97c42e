#!/bin/sh
# The first process: loads the drivers that the kernel's command line names in load=, and starts a
# shell on the serial port. The test types the rest.
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
load=
for word in $(cat /proc/cmdline); do
    case $word in load=*) load=${word#load=} ;; esac
done
mkdir -p /tmp/loaded
for name in $(echo "$load" | tr , ' '); do
    while read -r module; do
        [ -e "/tmp/loaded/$module" ] && continue
        : >"/tmp/loaded/$module"
        insmod "/lib/modules/$module" || echo "cannot load $module"
    done <"/lib/modules/$name.order"
done
stty -echo </dev/ttyS0
echo "qemu_e2e: the shell is ready" >/dev/ttyS0
while :; do
    PS1= setsid -c sh </dev/ttyS0 >/dev/ttyS0 2>&1
done
