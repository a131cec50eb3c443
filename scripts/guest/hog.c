/*
 * Fills memory with pages that are different in each pass, and verifies every word of them before it rewrites them.
 *
 *     hog MIB PASSES SEED
 *
 * Of 16 pages, one is the same word all over, two are random, and thirteen are records that compress by half to
 * three quarters. It locks nothing and forks nothing. Each second it says how far it is, and what the longest wait for
 * a page was; the last line is "hog: ok" if every word was right. Status 1: a word was wrong; 2: usage or no memory;
 * 3: SIGBUS, which is how the kernel says that a page could not be read back.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

static double started, longest, said;
static size_t pages;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

static void make(uint64_t *words, size_t page, unsigned pass, uint64_t seed)
{
    uint64_t key = mix(mix(seed + 0x9e3779b97f4a7c15 * page) + pass), kind = page % 16;

    for (int i = 0; i < WORDS; i++) {
        if (kind == 0)
            words[i] = key;
        else if (kind <= 2)
            words[i] = mix(key + i);
        else if (i % 4 == 0)
            words[i] = key;
        else if (i % 4 == 1)
            words[i] = page * WORDS + i;
        else
            words[i] = i % 4 == 2 ? mix(key + i) & 0xff00ff : 0x2020206e69617274;
    }
}

static void say(const char *what, unsigned pass, size_t page)
{
    char line[160];
    int length = snprintf(line, sizeof line, "hog: %6.1f s %s, pass %u, page %zu of %zu, longest wait %.1f s\n",
                          now() - started, what, pass, page, pages, longest);

    if (write(1, line, length) != length)
        _exit(2);
}

static void on_sigbus(int number)
{
    static const char line[] = "hog: SIGBUS, a page could not be read back\n";

    (void)number;
    if (write(1, line, sizeof line - 1)) {
    }
    _exit(3);
}

int main(int argc, char **argv)
{
    static uint64_t wanted[WORDS];

    if (argc != 4) {
        fprintf(stderr, "usage: hog MIB PASSES SEED\n");
        return 2;
    }
    pages = strtoul(argv[1], NULL, 10) << 8;
    unsigned passes = strtoul(argv[2], NULL, 10);
    uint64_t seed = strtoull(argv[3], NULL, 10);
    uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("hog: mmap");
        return 2;
    }
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    signal(SIGBUS, on_sigbus);
    started = said = now();
    for (unsigned pass = 0; pass <= passes; pass++) {
        for (size_t page = 0; page < pages; page++) {
            double before = now();
            uint64_t *words = memory + page * WORDS;

            if (pass > 0) {
                make(wanted, page, pass - 1, seed);
                for (int i = 0; i < WORDS; i++)
                    if (words[i] != wanted[i]) {
                        printf("hog: WRONG: pass %u, page %zu, word %d is %#lx, not %#lx\n", pass, page, i, words[i], wanted[i]);
                        return 1;
                    }
            }
            if (pass < passes)
                make(words, page, pass, seed);
            double after = now();
            if (after - before > longest)
                longest = after - before;
            if (after - said >= 1) {
                say(pass ? "verifies" : "fills", pass, page);
                said = after;
            }
        }
        say(pass ? "verified" : "filled", pass, pages);
    }
    say("ok", passes, pages);
    return 0;
}
