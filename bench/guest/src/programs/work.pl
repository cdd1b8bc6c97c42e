# The workload "perl": regular expressions, hashes, substitution, sorting, formatting.
use strict;
my (%count, %by_length, @fields);
my ($numbers, $vowels, $swapped) = (0, 0, 0);
while (my $line = <STDIN>) {
    chomp $line;
    for my $word ($line =~ /([a-z]+)/g) {
        $count{$word}++;
        push @{$by_length{length $word}}, $word if $count{$word} == 1;
    }
    $numbers += $1 while $line =~ /\b(\d+)\b/g;
    $vowels += ($line =~ tr/aeiou//);
    $swapped++ if $line =~ s/(\w+) (\w+)$/$2 $1/;
    my @parts = split / /, $line;
    $fields[$_] += length $parts[$_] for 0 .. $#parts;
}
my @top = (sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count)[0 .. 9];
printf "%-12s %d\n", $_, $count{$_} for @top;
printf "length %2d: %d, last %s\n", $_, scalar @{$by_length{$_}}, (sort @{$by_length{$_}})[-1]
    for sort { $a <=> $b } keys %by_length;
print "numbers $numbers vowels $vowels swapped $swapped fields @fields\n";
