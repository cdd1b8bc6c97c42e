# The workload "sh_commands": many short programs, as build scripts start them.
read -r scale < commands.size
b=$ROOT/bin/busybox
i=0
while [ "$i" -lt "$scale" ]; do
    "$b" expr "$i" \* 7 > number
    read -r n < number
    case $("$b" basename "/usr/src/file$n.c" .c) in file*) "$b" true ;; *) "$b" false || exit 1 ;; esac
    "$b" echo "$n $i" | "$b" sed 's/ /-/' >> list
    i=$((i + 1))
done
"$b" sort list | "$b" uniq | "$b" wc -l
"$b" rm -f list number
