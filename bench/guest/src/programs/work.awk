# The workload "awk": sums by key, fields, string functions.
{
    lines++
    for (i = 1; i <= NF; i++) {
        if ($i ~ /^[0-9]+$/) { total += $i; squares = (squares + $i * $i) % 1000003 }
        else { seen[$i]++; letters += length($i) }
    }
    key = substr($1, 1, 2)
    size[key] += NF
    if (index($0, "th") > 0) th++
    gsub(/[aeiou]/, "#")
    marks += gsub(/#/, "")
}
END {
    for (word in seen) { words++; if (seen[word] > most) most = seen[word] }
    for (key in size) { keys++; fields += size[key] }
    printf "%d lines, %d words, %d at most, %d letters\n", lines, words, most, letters
    printf "%d keys, %d fields, %d with th, %d vowels, total %.0f, squares %d\n", keys, fields, th, marks, total, squares
}
