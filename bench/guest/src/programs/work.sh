# The workload "busybox_sh": arithmetic, functions, strings, lists; no other program.
read -r scale < sh.size
collatz() {
    n=$1 steps=0
    while [ "$n" -ne 1 ]; do
        if [ $((n % 2)) -eq 0 ]; then n=$((n / 2)); else n=$((3 * n + 1)); fi
        steps=$((steps + 1))
    done
}
total=0 i=1
while [ "$i" -le "$scale" ]; do
    collatz "$i"
    total=$((total + steps)) i=$((i + 1))
done
echo "collatz $total"
list= kinds=0 i=0
while [ "$i" -lt $((scale * 4)) ]; do
    word=/usr/lib/part$((i % 37))/file$i.tar.gz
    name=${word##*/} base=${name%%.*} place=${word%/*}
    case $place in
        */part1?) kinds=$((kinds + 1)) ;;
        */part[2-5]) kinds=$((kinds + 2)) ;;
        *) kinds=$((kinds + ${#base})) ;;
    esac
    i=$((i + 1))
done
echo "kinds $kinds $name $base $place"
set --
i=0
while [ "$i" -lt 200 ]; do set -- "$@" "item$i"; i=$((i + 1)); done
sum=0
while [ $# -gt 0 ]; do sum=$((sum + ${#1})); shift; done
echo "items $sum"
