#!/bin/sh
# The first process of a foreign kernel under test: loads the drivers and starts a shell on the
# serial port. The test types the rest.
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    insmod "/lib/modules/$module" || echo "cannot load $module"
done </lib/modules/order
stty -echo </dev/ttyS0
echo "e2e: the shell is ready"
while :; do
    PS1= setsid -c sh </dev/ttyS0 >/dev/ttyS0 2>&1
done
