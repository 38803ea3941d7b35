// SPDX-License-Identifier: GPL-2.0-only
/* Timing and checking side of the generic_pt user-space bench (libc only). */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "gp.h"

typedef unsigned long ul;
#define K4 0x1000UL
#define M1 0x100000UL
#define M2 0x200000UL
#define G1 0x40000000UL
#define ARENA_PAGES (1UL << 15)		/* 128 MiB of table pages */

static int csv_only;

/* ---- correctness ------------------------------------------------------- */

#define CHECK(c) do { if (!(c)) { \
	fprintf(stderr, "FAIL %s:%d [%s] %s\n", __FILE__, __LINE__, \
		gp_name(cur_fmt), #c); exit(1); } } while (0)
static int cur_fmt;

static unsigned long long rs = 88172645463325252ULL;
static ul rnd(void)
{
	rs ^= rs << 13;
	rs ^= rs >> 7;
	rs ^= rs << 17;
	return rs;
}

/* Independent decode of the table memory as the hardware would read it, for
 * 4K/2M/1G leaves.  Returns the leaf level or -1 where nothing is mapped. */
static int hw_walk(struct gp *g, ul iova, ul *pa)
{
	unsigned int levels;
	ul tab = gp_root(g, &levels);
	int l;

	for (l = levels - 1; l >= 0; l--) {
		ul e = ((ul *)gp_phys_to_virt(tab))[(iova >> (12 + 9 * l)) & 511];
		ul adr = e & 0x000ffffffffff000UL;
		int leaf, present;

		switch (gp_family(cur_fmt)) {
		case GP_VTDSS:
			present = (e & 3) != 0;
			leaf = !l || (e & 0x80);
			break;
		case GP_X86_64:
			present = e & 1;
			leaf = !l || (e & 0x80);
			break;
		case GP_AMDV1:
			present = e & 1;
			leaf = ((e >> 9) & 7) == 0;
			break;
		default:
			present = e & 1;
			leaf = (e & 0xe) != 0;
			adr = ((e >> 10) & 0xfffffffffffUL) << 12;
		}
		if (!present)
			return -1;
		if (leaf) {
			*pa = adr | (iova & ((1UL << (12 + 9 * l)) - 1));
			return l;
		}
		tab = adr;
	}
	return -1;
}

static void check_format(int fmt)
{
	static const ul lens[] = { K4, 2 * K4, 7 * K4, 16 * K4, 256 * K4, M2,
				   M2 + K4, 3 * M2, 12 * M2 };
	enum { SLOTS = 64 };
	ul slot = 16 * M2, base = 0x2000000000UL;
	ul off[SLOTS] = { 0 }, len[SLOTS] = { 0 }, pa0[SLOTS] = { 0 };
	ul live0 = gp_cnt.allocs - gp_cnt.frees, pa, i;
	struct gp *g;
	int err, k;

	cur_fmt = fmt;
	g = gp_open(fmt, &err);
	if (!g) {
		fprintf(stderr, "%s: init failed %d\n", gp_name(fmt), err);
		exit(1);
	}
	/* single leaves of each size */
	for (k = 0; k < 3; k++) {
		ul sz = k == 0 ? K4 : k == 1 ? M2 : G1, at = base + 4 * G1 * k;

		CHECK(gp_lookup(g, at) == 0);
		CHECK(gp_map(g, at, 0x5000000000UL, sz) == (long)sz);
		CHECK(gp_lookup(g, at) == 0x5000000000UL);
		CHECK(gp_lookup(g, at + sz - 1) == 0x5000000000UL + sz - 1);
		CHECK(gp_lookup(g, at + sz) == 0);
		CHECK(gp_lookup(g, at - 1) == 0);
		CHECK(hw_walk(g, at + sz - 8, &pa) == k);
		CHECK(pa == 0x5000000000UL + sz - 8);
		CHECK(gp_map(g, at, 0x6000000000UL, K4) == -EADDRINUSE);
		CHECK(gp_lookup(g, at + 8) == 0x5000000008UL);
		CHECK(gp_unmap(g, at, sz) == sz);
		CHECK(gp_lookup(g, at) == 0);
		CHECK(hw_walk(g, at, &pa) == -1);
		CHECK(gp_unmap(g, at, sz) == 0);
	}
	CHECK(gp_map(g, base + 1, 0x5000000000UL, K4) == -ENXIO);
	CHECK(gp_map(g, base, 0x5000000001UL, K4) == -ENXIO);
	CHECK(gp_map(g, base, 0x5000000000UL, 0) == -EINVAL);
	CHECK(gp_map(g, 1UL << 50, 0x5000000000UL, K4) < 0);

	/* misaligned physical address forces 4K leaves */
	CHECK(gp_map(g, base, 0x5000001000UL, 256 * K4) == 256 * (long)K4);
	for (i = 0; i < 256; i++) {
		CHECK(hw_walk(g, base + i * K4, &pa) == 0);
		CHECK(pa == 0x5000001000UL + i * K4);
	}
	CHECK(gp_unmap(g, base, 256 * K4) == 256 * K4);
	CHECK(gp_map(g, base, 0x5000000000UL + M2, 256 * M2) == 256 * (long)M2);
	for (i = 0; i < 256; i++) {
		CHECK(hw_walk(g, base + i * M2 + 0x5000, &pa) == 1);
		CHECK(pa == 0x5000005000UL + M2 + i * M2);
	}
	CHECK(gp_unmap(g, base, 256 * M2) == 256 * M2);

	/* random map/unmap against a model */
	for (i = 0; i < 20000; i++) {
		ul s = rnd() % SLOTS, at = base + s * slot;

		if (len[s]) {
			for (k = 0; k < 4; k++) {
				ul o = rnd() % slot;
				ul want = o >= off[s] && o < off[s] + len[s] ?
					pa0[s] + (o - off[s]) : 0;

				CHECK(gp_lookup(g, at + o) == want);
			}
			CHECK(gp_lookup(g, at + off[s]) == pa0[s]);
			CHECK(gp_lookup(g, at + off[s] + len[s] - 1) ==
			      pa0[s] + len[s] - 1);
			CHECK(gp_unmap(g, at + off[s], len[s]) == len[s]);
			CHECK(gp_lookup(g, at + off[s]) == 0);
			len[s] = 0;
		} else {
			len[s] = lens[rnd() % (sizeof(lens) / sizeof(*lens))];
			off[s] = rnd() % ((slot - len[s]) / K4) * K4;
			if (rnd() & 1)
				off[s] &= ~(M2 - 1);
			pa0[s] = 0x100000000UL + (rnd() & 0xfffffff000UL);
			if (rnd() & 1)
				pa0[s] = (pa0[s] & ~(M2 - 1)) | (off[s] & (M2 - 1));
			CHECK(gp_map(g, at + off[s], pa0[s], len[s]) ==
			      (long)len[s]);
		}
	}
	if (gp_has_dirty(fmt)) {
		ul at = base + 8 * G1, n0;
		unsigned char bm[64] = { 0 };

		CHECK(gp_map(g, at, 0x5000001000UL, 512 * K4) == 512 * (long)K4);
		n0 = gp_cnt.dirty_sets;
		CHECK(gp_read_clear_dirty(g, at, 512 * K4, bm, at) == 0);
		memset(bm, 0, sizeof(bm));
		n0 = gp_cnt.dirty_sets;
		CHECK(gp_read_clear_dirty(g, at, 512 * K4, bm, at) == 0);
		CHECK(gp_cnt.dirty_sets == n0);
		for (i = 0; i < 512; i += 3)
			CHECK(gp_set_dirty(g, at + i * K4) == 0);
		CHECK(gp_read_clear_dirty(g, at, 512 * K4, bm, at) == 0);
		CHECK(gp_cnt.dirty_sets == n0 + 171);
		for (i = 0; i < 512; i++)
			CHECK(((bm[i / 8] >> (i & 7)) & 1) == (i % 3 == 0));
		CHECK(gp_unmap(g, at, 512 * K4) == 512 * K4);
	}
	gp_close(g);
	CHECK(gp_cnt.allocs - gp_cnt.frees == live0);	/* nothing leaked */
}

/* ---- timing ------------------------------------------------------------ */

static double now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1e9 + ts.tv_nsec;
}

static double clock_cost;

#define MAXPASS 4096
struct series {
	double v[MAXPASS];
	int n;
	ul allocs, syncs, calls;
};

static int cmp_d(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* One row per (format, op); each round adds its median over passes. */
#define MAXROUND 32
static struct row {
	const char *fmt, *op;
	ul pages, calls_per_pass;
	double med[MAXROUND], min, tables, syncs;
	int rounds, passes;
} rows[512];
static int nrows;

static void report(const char *fmt, const char *op, struct series *s,
		   ul calls_per_pass, ul pages_per_call)
{
	double pc = calls_per_pass;
	struct row *r;

	for (r = rows; r < rows + nrows; r++)
		if (!strcmp(r->fmt, fmt) && !strcmp(r->op, op))
			break;
	if (r == rows + nrows) {
		nrows++;
		r->fmt = fmt;
		r->op = op;
		r->pages = pages_per_call;
		r->calls_per_pass = calls_per_pass;
		r->min = 1e18;
	}
	qsort(s->v, s->n, sizeof(double), cmp_d);
	r->med[r->rounds++] = s->v[s->n / 2] / pc;
	if (s->v[0] / pc < r->min)
		r->min = s->v[0] / pc;
	r->tables = (double)s->allocs / s->calls;
	r->syncs = (double)s->syncs / s->calls;
	r->passes = s->n;
	memset(s, 0, sizeof(*s));
}

static void print_rows(void)
{
	struct row *r;

	printf("format,op,ns_per_call,ns_per_page\n");
	for (r = rows; r < rows + nrows; r++) {
		qsort(r->med, r->rounds, sizeof(double), cmp_d);
		printf("%s,%s,%.2f,%.3f\n", r->fmt, r->op, r->med[0],
		       r->med[0] / r->pages);
		if (!csv_only)
			printf("#stat,%s,%s,fastest_pass=%.2f,round_median=%.2f,slowest_round=%.2f,rounds=%d,passes=%d,calls_per_pass=%lu,tables_per_call=%.4f,syncs_per_call=%.2f\n",
			       r->fmt, r->op, r->min, r->med[r->rounds / 2],
			       r->med[r->rounds - 1], r->rounds, r->passes,
			       r->calls_per_pass, r->tables, r->syncs);
	}
}

static struct series s1, s2;

#define TIMED(s, calls_, stmt) do { \
	ul a_ = gp_cnt.allocs, y_ = gp_cnt.syncs, bad_; \
	double t_ = now_ns(); \
	bad_ = (stmt); \
	t_ = now_ns() - t_ - clock_cost; \
	if (bad_) { fprintf(stderr, "FAIL %s: %lu bad in %s\n", \
			    gp_name(cur_fmt), bad_, #stmt); exit(1); } \
	if (pass >= 0) { \
		(s)->v[(s)->n++] = t_; \
		(s)->allocs += gp_cnt.allocs - a_; \
		(s)->syncs += gp_cnt.syncs - y_; \
		(s)->calls += (calls_); \
	} } while (0)

static void bench_format(int fmt)
{
	static const struct {
		const char *map, *unmap;
		ul pg, pages, n, skew;
		int passes;
	} ops[] = {
		{ "map_1x4K", "unmap_1x4K", K4, 1, 4096, 0, 41 },
		{ "map_256x4K", "unmap_256x4K", K4, 256, 64, K4, 101 },
		{ "map_1x2M", "unmap_1x2M", M2, 1, 4096, 0, 41 },
		{ "map_256x2M", "unmap_256x2M", M2, 256, 16, M2, 101 },
		{ "map_1x1G", "unmap_1x1G", G1, 1, 256, 0, 101 },
		{ "map_1G_as_4K", "unmap_1G_as_4K", K4, 262144, 1, K4, 11 },
	};
	const char *name = gp_name(fmt);
	ul base = 0x1000000000UL, pa = 0x8000000000UL;
	struct gp *g;
	unsigned int i;
	int pass, err;

	cur_fmt = fmt;
	for (i = 0; i < sizeof(ops) / sizeof(*ops); i++) {
		ul len = ops[i].pg * ops[i].pages, n = ops[i].n;

		g = gp_open(fmt, &err);
		for (pass = -5; pass < ops[i].passes; pass++) {
			TIMED(&s1, n, gp_map_n(g, base, pa + ops[i].skew, len, n));
			TIMED(&s2, n, gp_unmap_n(g, base, len, n));
		}
		gp_close(g);
		report(name, ops[i].map, &s1, n, ops[i].pages);
		report(name, ops[i].unmap, &s2, n, ops[i].pages);
	}

	/* same address again and again */
	g = gp_open(fmt, &err);
	for (pass = -5; pass < 41; pass++)
		TIMED(&s1, 4096, gp_pair_n(g, base, pa, K4, 4096));
	gp_close(g);
	report(name, "mapunmap_1x4K_hot", &s1, 4096, 1);

	/* every map needs one new leaf table (2M stride, fresh tables) */
	for (pass = -3; pass < 7; pass++) {
		g = gp_open(fmt, &err);
		TIMED(&s1, 2048, gp_newtable_n(g, base, pa, M2, 2048));
		gp_close(g);
	}
	report(name, "map_1x4K_newtable", &s1, 2048, 1);

	/* lookups: 1M pages of 4K (4 GiB), then 4096 pages of 2M (8 GiB) */
	g = gp_open(fmt, &err);
	if (gp_map(g, base, pa + K4, 4 * G1) != (long)(4 * G1))
		exit(1);
	for (pass = -1; pass < 3; pass++)
		TIMED(&s1, 1 << 20, gp_lookup_n(g, base, 12, 20, 1 << 20, 0, pa + K4 - base));
	report(name, "iova_to_phys_rand_1Mx4K", &s1, 1 << 20, 1);
	for (pass = -1; pass < 3; pass++)
		TIMED(&s1, 1 << 20, gp_lookup_n(g, base, 12, 20, 1 << 20, 1, pa + K4 - base));
	report(name, "iova_to_phys_rand_1Mx4K_dep", &s1, 1 << 20, 1);
	gp_close(g);

	g = gp_open(fmt, &err);
	if (gp_map(g, base, pa + M2, 8 * G1) != (long)(8 * G1))
		exit(1);
	for (pass = -1; pass < 3; pass++)
		TIMED(&s1, 1 << 20, gp_lookup_n(g, base, 21, 12, 1 << 20, 0, pa + M2 - base));
	report(name, "iova_to_phys_rand_4096x2M", &s1, 1 << 20, 1);
	for (pass = -1; pass < 3; pass++)
		TIMED(&s1, 1 << 20, gp_lookup_n(g, base, 21, 12, 1 << 20, 1, pa + M2 - base));
	report(name, "iova_to_phys_rand_4096x2M_dep", &s1, 1 << 20, 1);
	gp_close(g);

	if (gp_has_dirty(fmt)) {
		static unsigned char bm[32768];
		static const char *const nm[] = { "dirty_scan_clean_1G_4K",
			"dirty_rc_all_1G_4K_count", "dirty_rc_all_1G_4K_bitmap" };
		ul k;
		int m;

		g = gp_open(fmt, &err);
		if (gp_map(g, base, pa + K4, G1) != (long)G1)
			exit(1);
		gp_read_clear_dirty(g, base, G1, NULL, base);
		for (m = 0; m < 3; m++) {
			for (pass = -2; pass < 5; pass++) {
				ul d0;

				if (m)
					for (k = 0; k < 262144; k++)
						gp_set_dirty(g, base + k * K4);
				memset(bm, 0, sizeof(bm));
				d0 = gp_cnt.dirty_sets;
				TIMED(&s1, 1, (ul)gp_read_clear_dirty(g, base, G1,
						m == 2 ? bm : NULL, base));
				if (gp_cnt.dirty_sets - d0 != (m ? 262144 : 0))
					exit(1);
			}
			report(name, nm[m], &s1, 1, 262144);
		}
		gp_close(g);
	}
}

/* What the machine does without any page-table code: random 8-byte loads from
 * as much memory as the leaf tables of 1M 4K pages take. */
static ul *raw_mem;
static ul raw_loads(ul n, int dependent)
{
	ul x = 0x9e3779b97f4a7c15UL, sum = 0, fold = 0;

	for (; n; n--) {
		ul v;

		x = (x ^ fold) * 6364136223846793005UL + 1442695040888963407UL;
		v = ((volatile ul *)raw_mem)[x >> 44];
		sum += v;
		if (dependent)
			fold = v;
	}
	return sum;		/* memory is all zero, so 0 */
}

/* Table pages (excluding the root) that 1 GiB takes with a given leaf size. */
static ul footprint(ul pg)
{
	ul before, n;
	int err;
	struct gp *g = gp_open(0, &err);

	before = gp_cnt.allocs;
	gp_map(g, 0x1000000000UL, 0x8000000000UL + pg, G1);
	n = gp_cnt.allocs - before;
	gp_close(g);
	return n;
}

/* How much of this process the host kernel backs with huge pages. */
static void print_thp(void)
{
	char line[256];
	FILE *f = fopen("/proc/self/smaps_rollup", "r");

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, "AnonHugePages:", 14) ||
		    !strncmp(line, "Rss:", 4))
			printf("#mem,%s", line);
	if (f)
		fclose(f);
}

int main(int argc, char **argv)
{
	int i, rounds = 5, round, pass;
	const char *only = NULL;
	ul t0, tables[64] = { 0 };

	for (i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "-q"))
			csv_only = 1;
		else if (!strcmp(argv[i], "-r") && i + 1 < argc)
			rounds = atoi(argv[++i]);
		else if (!strcmp(argv[i], "-f") && i + 1 < argc)
			only = argv[++i];
		else {
			fprintf(stderr, "usage: %s [-q] [-r rounds] [-f format]\n", argv[0]);
			return 2;
		}
	}
	if (rounds < 1 || rounds > MAXROUND)
		rounds = 5;
	if (getenv("GP_CPU")) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET(atoi(getenv("GP_CPU")), &set);
		sched_setaffinity(0, sizeof(set), &set);
	}
	gp_setup_memory(ARENA_PAGES);
	raw_mem = gp_map_memory(8 * M1);

	clock_cost = 1e9;
	for (i = 0; i < 1000; i++) {
		double a = now_ns(), b = now_ns();

		if (b - a < clock_cost)
			clock_cost = b - a;
	}
	for (i = 0; i < gp_nformats(); i++)
		if (gp_is_benched(i) && (!only || !strcmp(only, gp_name(i))))
			check_format(i);
	if (!csv_only)
		printf("#check,all formats pass\n");

	for (round = 0; round < rounds; round++) {
		for (pass = -5; pass < 101; pass++)
			TIMED(&s1, 1024, gp_pool_cycle(1024));
		report("machine", "table_alloc_zero_free", &s1, 1024, 1);
		for (pass = -1; pass < 3; pass++)
			TIMED(&s1, 1 << 20, raw_loads(1 << 20, 0));
		report("machine", "load_rand_8MiB", &s1, 1 << 20, 1);
		for (pass = -1; pass < 3; pass++)
			TIMED(&s1, 1 << 20, raw_loads(1 << 20, 1));
		report("machine", "load_rand_8MiB_dep", &s1, 1 << 20, 1);

		for (i = 0; i < gp_nformats(); i++) {
			if (!gp_is_benched(i) ||
			    (only && strcmp(only, gp_name(i))))
				continue;
			t0 = gp_cnt.allocs;
			bench_format(i);
			tables[i] += gp_cnt.allocs - t0;
		}
	}
	print_rows();
	if (!csv_only)
		print_thp();
	for (i = 0; i < gp_nformats() && !csv_only; i++)
		if (gp_is_benched(i))
			printf("#tables,%s,allocated_during_bench=%lu\n", gp_name(i),
			       tables[i]);
	if (!csv_only)
		printf("#footprint,tables_for_1GiB_of_4K=%lu,tables_for_1GiB_of_2M=%lu\n",
		       footprint(K4), footprint(M2));
	printf("#total,table_pages_allocated=%lu,freed=%lu,iotlb_syncs=%lu,clflush_ranges=%lu,dirty_sets=%lu\n",
	       gp_cnt.allocs, gp_cnt.frees, gp_cnt.syncs, gp_cnt.clflushes,
	       gp_cnt.dirty_sets);
	return 0;
}
