// SPDX-License-Identifier: GPL-2.0-only
/*
 * gpdrive: the kernel's I/O page tables, driven by another program over standard
 * input and output.
 *
 * A command is a line, an answer is a line, or for `formats`, `entries` and
 * `harvest` a line with a count and so many lines after it.  Addresses, lengths and entries are
 * hexadecimal without a prefix; errnos, levels and counts are decimal.
 *
 *   formats                 formats N, then N names
 *   open FORMAT             ok | error ERRNO
 *   map IOVA OA LEN PROT    ok | error ERRNO     PROT: the kernel's IOMMU_* bits
 *   unmap IOVA LEN          ok BYTES
 *   walk IOVA               ok OA                0: nothing is mapped
 *   tables                  ok N                 table pages, the top included
 *   entries                 entries N, then N lines:
 *                             leaf LEVEL IOVA ENTRY STEP COUNT
 *                             table LEVEL IOVA ENTRY
 *   dirty IOVA              ok | error ERRNO     as if a device wrote there
 *   harvest IOVA LEN        dirty N, then N lines IOVA LEN; they are clean then
 *   close                   ok
 *   quit
 *
 * A line `leaf` stands for COUNT neighbouring entries of one level, each STEP
 * more than the one before (modulo 2^64).  Levels count from 1.
 *
 * Commands may be sent ahead: answers are written out when no whole command is
 * left to be read.  Whoever sends far ahead must read meanwhile.  A command that
 * makes no sense ends the program with status 2, an assertion of the kernel's
 * code with status 4.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "gp.h"

typedef unsigned long ul;
#define ARENA_PAGES (1UL << 15)		/* 128 MiB of table pages */

/* ---- input and output ---------------------------------------------------- */

static char in[1 << 16];
static size_t in_first, in_end;

static const char *command = "";

/* WARN_ON() is an illegal instruction. */
static void asserted(int signal)
{
	static const char text[] = "gpdrive: an assertion of the kernel's code at: ";

	(void)signal;
	if (write(2, text, sizeof(text) - 1) < 0 ||
	    write(2, command, strlen(command)) < 0 || write(2, "\n", 1) < 0)
		_exit(4);
	_exit(4);
}

/* The next line without its end, or NULL at the end of the input. */
static char *next_line(void)
{
	for (;;) {
		char *line = in + in_first;
		char *end = memchr(line, '\n', in_end - in_first);
		ssize_t n;

		if (end) {
			*end = 0;
			in_first = end + 1 - in;
			return line;
		}
		fflush(stdout);
		memmove(in, line, in_end - in_first);
		in_end -= in_first;
		in_first = 0;
		if (in_end == sizeof(in)) {
			fprintf(stderr, "gpdrive: a line without end\n");
			exit(2);
		}
		n = read(0, in + in_end, sizeof(in) - in_end);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return NULL;
		in_end += n;
	}
}

static void nonsense(const char *line)
{
	fflush(stdout);
	fprintf(stderr, "gpdrive: cannot make sense of '%s'\n", line);
	exit(2);
}

/* The numbers behind the command's word; exactly `count` of them. */
static void numbers(char *text, const char *line, int count, ul *values)
{
	int i;

	for (i = 0; i < count; i++) {
		char *end;

		errno = 0;
		values[i] = strtoul(text, &end, 16);
		if (end == text || errno)
			nonsense(line);
		text = end;
	}
	if (*text)
		nonsense(line);
}

/* ---- entries ------------------------------------------------------------- */

struct line {
	int leaf;
	unsigned int level;
	ul iova;
	unsigned long long entry, step;
	ul count;
};
static struct line *lines;
static size_t lines_used, lines_room;
static ul entry_bytes_lg2[8];

static struct line *add_line(void)
{
	if (lines_used == lines_room) {
		lines_room = lines_room ? lines_room * 2 : 1024;
		lines = realloc(lines, lines_room * sizeof(*lines));
		if (!lines) {
			perror("gpdrive");
			exit(1);
		}
	}
	return &lines[lines_used++];
}

static void show_entry(void *context, int leaf, unsigned int level, ul iova,
		       unsigned long long entry)
{
	struct line *last = lines_used ? &lines[lines_used - 1] : NULL;

	(void)context;
	if (leaf && last && last->leaf && last->level == level &&
	    iova == last->iova + (last->count << entry_bytes_lg2[level])) {
		unsigned long long before = last->entry +
					    last->step * (last->count - 1);

		if (last->count == 1)
			last->step = entry - before;
		if (entry - before == last->step) {
			last->count++;
			return;
		}
	}
	*add_line() = (struct line){ leaf, level, iova, entry, 0, 1 };
}

static void answer_entries(struct gp *g, int fmt)
{
	struct pt_iommu *table = gp_iommu(g);
	size_t i;
	int ret;

	lines_used = 0;
	for (i = 1; i < 8; i++)
		entry_bytes_lg2[i] =
			(gp_family(fmt) == GP_MOCK ? 11 : 12) + 9 * (i - 1);
	switch (gp_family(fmt)) {
	case GP_VTDSS:
		ret = gp_dump_vtdss(table, show_entry, NULL);
		break;
	case GP_AMDV1:
		ret = gp_dump_amdv1(table, show_entry, NULL);
		break;
	case GP_X86_64:
		ret = gp_dump_x86_64(table, show_entry, NULL);
		break;
	case GP_RISCV64:
		ret = gp_dump_riscv64(table, show_entry, NULL);
		break;
	default:
		ret = gp_dump_mock(table, show_entry, NULL);
		break;
	}
	if (ret) {
		printf("error %d\n", -ret);
		return;
	}
	printf("entries %zu\n", lines_used);
	for (i = 0; i < lines_used; i++) {
		struct line *l = &lines[i];

		if (l->leaf)
			printf("leaf %u %lx %llx %llx %lu\n", l->level, l->iova,
			       l->entry, l->step, l->count);
		else
			printf("table %u %lx %llx\n", l->level, l->iova,
			       l->entry);
	}
}

/* ---- dirty leaves --------------------------------------------------------- */

static void show_dirty(void *context, ul iova, ul length)
{
	(void)context;
	*add_line() = (struct line){ .iova = iova, .count = length };
}

static void answer_harvest(struct gp *g, ul iova, ul length)
{
	int ret;
	size_t i;

	lines_used = 0;
	ret = gp_harvest(g, iova, length, show_dirty, NULL);
	if (ret) {
		printf("error %d\n", -ret);
		return;
	}
	printf("dirty %zu\n", lines_used);
	for (i = 0; i < lines_used; i++)
		printf("%lx %lx\n", lines[i].iova, lines[i].count);
}

/* ---- commands ------------------------------------------------------------ */

static int find_format(const char *name)
{
	int i;

	for (i = 0; i < gp_nformats(); i++)
		if (!strcmp(gp_name(i), name))
			return i;
	return -1;
}

int main(void)
{
	struct gp *g = NULL;
	int fmt = -1, err, i;
	ul tables_before = 0, v[4];
	char *line, *space;

	gp_setup_memory(ARENA_PAGES);
	signal(SIGILL, asserted);
	while ((line = next_line())) {
		char word[16], *rest;
		size_t length;

		space = strchr(line, ' ');
		length = space ? (size_t)(space - line) : strlen(line);
		if (length >= sizeof(word))
			nonsense(line);
		memcpy(word, line, length);
		word[length] = 0;
		rest = line + length;
		command = line;

		if (!strcmp(word, "quit"))
			break;
		if (!strcmp(word, "formats")) {
			printf("formats %d\n", gp_nformats());
			for (i = 0; i < gp_nformats(); i++)
				puts(gp_name(i));
			continue;
		}
		if (!strcmp(word, "open")) {
			fmt = *rest ? find_format(rest + 1) : -1;
			if (g || fmt < 0)
				nonsense(line);
			tables_before = gp_cnt.allocs - gp_cnt.frees;
			g = gp_open(fmt, &err);
			if (g)
				puts("ok");
			else
				printf("error %d\n", -err);
			continue;
		}
		if (!g)
			nonsense(line);
		if (!strcmp(word, "walk")) {
			numbers(rest, line, 1, v);
			printf("ok %lx\n", gp_lookup(g, v[0]));
		} else if (!strcmp(word, "map")) {
			numbers(rest, line, 4, v);
			err = gp_map_prot(g, v[0], v[1], v[2], v[3]);
			if (err)
				printf("error %d\n", -err);
			else
				puts("ok");
		} else if (!strcmp(word, "unmap")) {
			numbers(rest, line, 2, v);
			printf("ok %lx\n", gp_unmap(g, v[0], v[1]));
		} else if (!strcmp(word, "tables")) {
			printf("ok %lu\n", gp_cnt.allocs - gp_cnt.frees -
					   tables_before);
		} else if (!strcmp(word, "dirty") && gp_has_dirty(fmt)) {
			numbers(rest, line, 1, v);
			err = gp_set_dirty(g, v[0]);
			if (err)
				printf("error %d\n", -err);
			else
				puts("ok");
		} else if (!strcmp(word, "harvest") && gp_has_dirty(fmt)) {
			numbers(rest, line, 2, v);
			answer_harvest(g, v[0], v[1]);
		} else if (!strcmp(word, "entries")) {
			answer_entries(g, fmt);
		} else if (!strcmp(word, "close")) {
			gp_close(g);
			g = NULL;
			if (gp_cnt.allocs - gp_cnt.frees != tables_before) {
				fprintf(stderr, "gpdrive: table pages leaked\n");
				exit(3);
			}
			puts("ok");
		} else {
			nonsense(line);
		}
	}
	fflush(stdout);
	return 0;
}
