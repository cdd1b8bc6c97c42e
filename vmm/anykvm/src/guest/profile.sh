# Read by the login shell of AnyKVM's default guest.
PS1='root@\h:\w# '
. /anykvm/config
echo "A Linux guest of AnyKVM: $(uname -sr), busybox. Programs: /bin. Network: ${NET:-none}."
[ -n "$SCRATCH" ] && echo "/mnt is an empty disk that lasts as long as this machine."
echo "'exit' powers off. Ctrl-A x stops at once, Ctrl-A h shows all keys."
