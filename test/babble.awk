# Sentences from a small grammar, drawn by a linear congruential generator: text for tests that nobody wrote.
# awk -v seed=1 -v lines=100 -f test/babble.awk
function draw(n) { state = (state * 1103515245 + 12345) % 2147483648; return int(state / 65536) % n }
function pick(list, n, parts) { n = split(list, parts, " "); return parts[draw(n) + 1] }
function noun() { return pick("river stone lamp garden wheel letter winter mountain bottle road captain window song engine mirror field") }
function sentence(s) {
    s = pick("the a every some this") " " pick("old quiet green heavy bright broken small distant") " " noun()
    s = s " " pick("turns carries finds leaves remembers follows holds crosses") " " pick("the a one its") " " noun()
    if (draw(3) == 0) s = s " " pick("under over beside behind near") " " pick("the that") " " noun()
    return toupper(substr(s, 1, 1)) substr(s, 2) "."
}
BEGIN { state = seed * 7919 + 17; for (i = 0; i < lines; i++) { s = sentence(); if (draw(2)) s = s " " sentence(); print s } }
