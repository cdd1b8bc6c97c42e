-- The workload "sqlite3": inserts, indexes, joins, aggregates, text.
PRAGMA journal_mode = OFF;
CREATE TABLE size(n INTEGER);
.read sql.size
CREATE TABLE item(id INTEGER PRIMARY KEY, owner INTEGER, name TEXT, price INTEGER);
WITH RECURSIVE r(i, x) AS (
  SELECT 1, 12345
  UNION ALL SELECT i + 1, (x * 1103515245 + 12345) & 2147483647 FROM r WHERE i < (SELECT n FROM size)
)
INSERT INTO item SELECT i, x % 997, printf('item-%05d-%x', x % 10007, x), x % 5000 FROM r;
CREATE INDEX by_owner ON item(owner, price);
CREATE INDEX by_name ON item(name);
CREATE TABLE owner(id INTEGER PRIMARY KEY, city TEXT);
WITH RECURSIVE r(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM r WHERE i < 996)
INSERT INTO owner SELECT i, 'city ' || (i * 31 % 53) FROM r;
SELECT city, count(*), sum(price), max(name) FROM item JOIN owner ON owner.id = item.owner
  GROUP BY city ORDER BY 3 DESC LIMIT 5;
SELECT count(*) FROM item a JOIN item b ON a.owner = b.owner AND b.price > a.price WHERE a.id % 50 = 0;
SELECT count(DISTINCT substr(name, 6, 5)), sum(length(name)) FROM item WHERE name LIKE '%7%';
UPDATE item SET price = price + 1 WHERE owner % 3 = 0;
DELETE FROM item WHERE price % 11 = 0;
SELECT count(*), sum(price), min(name) FROM item;
SELECT group_concat(name, ',') FROM (SELECT name FROM item ORDER BY price DESC, id LIMIT 8);
