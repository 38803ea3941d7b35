// SPDX-License-Identifier: GPL-2.0-only
/*
 * User-space glue for the kernel's generic_pt formats.  This file is compiled
 * with the kernel's own headers and flags (see build.sh) and then linked, as
 * ordinary user code, with the kernel's fmt/iommu_*.c objects and main.c.
 *
 * It supplies the few symbols those objects leave undefined and thin loops
 * around the pt_iommu ops.  It calls the ops the way drivers/iommu/iommu.c
 * does: map_range through the ops pointer; unmap_range through the ops pointer
 * with a fresh gather, followed by iommu_iotlb_sync(), whose domain op here
 * does what a driver's does minus the hardware: count, then free the freelist.
 */
#include <linux/generic_pt/iommu.h>
#include <linux/iommu.h>
#include <linux/iova_bitmap.h>
#include <linux/mm.h>
#include "iommu-pages.h"
#include "gp.h"

/* ---- symbols the format objects need ---------------------------------- */

struct gp_counters gp_cnt;
unsigned long phys_base, page_offset_base, vmemmap_base;

/* Page pool: LIFO of order-0 pages from one arena. */
static void **pool;
static unsigned long pool_top;
static void *pool_slots[1 << 15];

static __always_inline void zero_4k(void *p)
{
	unsigned long n = PAGE_SIZE;

	/* what clear_page() patches itself to on a CPU with ERMS */
	asm volatile("rep stosb" : "+c"(n), "+D"(p) : "a"(0) : "memory");
}

void gp_pool_init(void *arena, unsigned long npages)
{
	unsigned long i;

	pool = pool_slots;
	if (npages > ARRAY_SIZE(pool_slots))
		__builtin_trap();
	for (i = 0; i < npages; i++)
		pool[pool_top++] = arena + (npages - 1 - i) * PAGE_SIZE;
}

void *iommu_alloc_pages_node_sz(int nid, gfp_t gfp, size_t size)
{
	struct ioptdesc *iopt;
	void *p;

	if (size > PAGE_SIZE)
		__builtin_trap();
	if (unlikely(!pool_top))
		return NULL;
	p = pool[--pool_top];
	zero_4k(p);
	iopt = virt_to_ioptdesc(p);
	iopt->incoherent = false;
	gp_cnt.allocs++;
	return p;
}

void iommu_free_pages(void *virt)
{
	if (!virt)
		return;
	pool[pool_top++] = virt;
	gp_cnt.frees++;
}

void iommu_put_pages_list(struct iommu_pages_list *list)
{
	struct ioptdesc *iopt, *tmp;

	list_for_each_entry_safe(iopt, tmp, &list->pages, iopt_freelist_elm)
		iommu_free_pages(folio_address(ioptdesc_folio(iopt)));
}

void clflush_cache_range(void *vaddr, unsigned int size)
{
	char *p = (char *)((unsigned long)vaddr & ~63UL);
	char *e = (char *)vaddr + size;

	gp_cnt.clflushes++;
	asm volatile("mfence" ::: "memory");
	for (; p < e; p += 64)
		asm volatile("clflushopt %0" : "+m"(*p));
	asm volatile("mfence" ::: "memory");
}

int iommu_pages_start_incoherent(void *virt, struct device *dma_dev)
{
	clflush_cache_range(virt, PAGE_SIZE);
	virt_to_ioptdesc(virt)->incoherent = 1;
	return 0;
}

int iommu_pages_start_incoherent_list(struct iommu_pages_list *list,
				      struct device *dma_dev)
{
	struct ioptdesc *cur;

	list_for_each_entry(cur, &list->pages, iopt_freelist_elm)
		iommu_pages_start_incoherent(
			folio_address(ioptdesc_folio(cur)), dma_dev);
	return 0;
}

/* The kernel's struct iova_bitmap is private to its own .c file, so the
 * pointer passed through is simply this one: a flat bitmap, 1 bit per 4K. */
struct flat_bitmap {
	unsigned char *bits;
	unsigned long base;
#ifdef CONFIG_DEBUG_GENERIC_PT
	gp_range_fn_t show;
	void *context;
#endif
};

void iova_bitmap_set(struct iova_bitmap *bitmap, unsigned long iova,
		     size_t length)
{
	struct flat_bitmap *b = (struct flat_bitmap *)bitmap;
	unsigned long i, end;

	gp_cnt.dirty_sets++;
#ifdef CONFIG_DEBUG_GENERIC_PT
	if (b->show) {
		b->show(b->context, iova, length);
		return;
	}
#endif
	if (!b->bits)
		return;
	i = (iova - b->base) >> PAGE_SHIFT;
	end = i + (length >> PAGE_SHIFT);
	for (; i < end; i++)
		b->bits[i >> 3] |= 1 << (i & 7);
}

/* Only reached through increase_top() (amdv1) or a warning print. */
#undef _raw_spin_lock_irqsave
#undef _raw_spin_unlock_irqrestore
unsigned long _raw_spin_lock_irqsave(raw_spinlock_t *lock) { return 0; }
void _raw_spin_unlock_irqrestore(raw_spinlock_t *lock, unsigned long flags) {}
#undef _printk
int _printk(const char *fmt, ...) { return 0; }
int ___ratelimit(struct ratelimit_state *rs, const char *func) { return 0; }

/* ---- formats ----------------------------------------------------------- */

struct gp {
	union {
		struct iommu_domain domain;
		struct pt_iommu iommu;
		struct pt_iommu_vtdss vtdss;
		struct pt_iommu_amdv1 amdv1;
		struct pt_iommu_x86_64 x86_64;
		struct pt_iommu_riscv_64 riscv64;
		struct pt_iommu_amdv1_mock mock;
	};
	int fmt;
	int used;
};

static void count_sync(struct iommu_domain *domain,
		       struct iommu_iotlb_gather *gather)
{
	gp_cnt.syncs++;
	iommu_put_pages_list(&gather->freelist);
}

static void count_change_top(struct pt_iommu *t, phys_addr_t pa,
			     unsigned int level)
{
	gp_cnt.top_changes++;
}
static spinlock_t top_lock;
static spinlock_t *get_top_lock(struct pt_iommu *t) { return &top_lock; }

static const struct pt_iommu_driver_ops drv_ops = {
	.change_top = count_change_top,
	.get_top_lock = get_top_lock,
};

#define DOM_OPS(f)                                                       \
	static const struct iommu_domain_ops f##_dom_ops = {             \
		IOMMU_PT_DOMAIN_OPS(f), .iotlb_sync = count_sync };      \
	static const struct iommu_dirty_ops f##_dirty_ops __maybe_unused = { \
		IOMMU_PT_DIRTY_OPS(f) }
DOM_OPS(vtdss);
DOM_OPS(amdv1);
DOM_OPS(x86_64);
DOM_OPS(riscv_64);
DOM_OPS(amdv1_mock);

/*
 * Feature sets are those the in-tree drivers ask for (Intel second stage and
 * first stage, AMD v1, RISC-V, and the iommufd self-test's mock).  The bench
 * runs the first rows only, all of them 4-level, 48-bit tables except amdv1_3l,
 * which is what the AMD driver really starts with.
 *
 * amdv1 is always built with a dynamic top; what keeps a table at its height is
 * that the next level would lie outside of the width.
 */
enum { F_INCOHERENT = 1, F_SNOOP = 2, F_BENCH = 4 };
static const struct {
	const char *name;
	int family;
	int levels, width;
	int flags;
} formats[] = {
	{ "vtdss", GP_VTDSS, 4, 48, F_BENCH },
	{ "amdv1", GP_AMDV1, 4, 48, F_BENCH },
	{ "x86_64", GP_X86_64, 4, 48, F_BENCH },
	{ "riscv64", GP_RISCV64, 4, 48, F_BENCH },
	{ "amdv1_3l", GP_AMDV1, 3, 48, F_BENCH },
	{ "vtdss_nc", GP_VTDSS, 4, 48, F_BENCH | F_INCOHERENT },
	{ "x86_64_nc", GP_X86_64, 4, 48, F_BENCH | F_INCOHERENT },

	{ "vtdss_3", GP_VTDSS, 3, 39, 0 },
	{ "vtdss_4", GP_VTDSS, 4, 48, 0 },
	{ "vtdss_4_snoop", GP_VTDSS, 4, 48, F_SNOOP },
	{ "vtdss_5", GP_VTDSS, 5, 57, 0 },
	{ "x86_64_4", GP_X86_64, 4, 48, 0 },
	{ "x86_64_5", GP_X86_64, 5, 57, 0 },
	{ "amdv1_4", GP_AMDV1, 4, 48, 0 },
	{ "amdv1_dynamic", GP_AMDV1, 3, 64, 0 },
	{ "riscv64_sv39", GP_RISCV64, 3, 39, 0 },
	{ "riscv64_sv48", GP_RISCV64, 4, 48, 0 },
	{ "riscv64_sv57", GP_RISCV64, 5, 57, 0 },
	{ "amdv1_mock", GP_MOCK, 3, 56, 0 },
};

int gp_nformats(void) { return ARRAY_SIZE(formats); }
const char *gp_name(int fmt) { return formats[fmt].name; }
int gp_family(int fmt) { return formats[fmt].family; }
int gp_is_benched(int fmt) { return formats[fmt].flags & F_BENCH; }
int gp_has_dirty(int fmt)
{
	return (gp_family(fmt) == GP_VTDSS || gp_family(fmt) == GP_AMDV1 ||
		gp_family(fmt) == GP_MOCK) &&
	       !(formats[fmt].flags & F_INCOHERENT);
}
unsigned long gp_struct_page_size(void) { return sizeof(struct page); }
void *gp_phys_to_virt(unsigned long pa) { return phys_to_virt(pa); }

static struct gp gps[4];
static char dummy_device[64] __aligned(64);

struct gp *gp_open(int fmt, int *err)
{
	int flags = formats[fmt].flags, levels = formats[fmt].levels;
	int i, width = formats[fmt].width, ret = -EINVAL;
	unsigned int nc = flags & F_INCOHERENT ? BIT(PT_FEAT_DMA_INCOHERENT) : 0;
	struct gp *g = NULL;

	for (i = 0; i < ARRAY_SIZE(gps); i++)
		if (!gps[i].used)
			g = &gps[i];
	if (!g)
		__builtin_trap();
	memset(g, 0, sizeof(*g));
	g->fmt = fmt;
	g->used = 1;
	g->iommu.nid = NUMA_NO_NODE;
	g->iommu.driver_ops = &drv_ops;
	g->iommu.iommu_device = (struct device *)dummy_device;

	switch (formats[fmt].family) {
	case GP_VTDSS: {
		struct pt_iommu_vtdss_cfg cfg = {
			.common.features = BIT(PT_FEAT_FLUSH_RANGE) | nc |
				(flags & F_SNOOP ?
				 BIT(PT_FEAT_VTDSS_FORCE_COHERENCE) : 0),
			.common.hw_max_vasz_lg2 = width,
			.common.hw_max_oasz_lg2 = 52,
			.top_level = levels - 1,
		};
		g->domain.ops = &vtdss_dom_ops;
		g->domain.dirty_ops = &vtdss_dirty_ops;
		ret = pt_iommu_vtdss_init(&g->vtdss, &cfg, GFP_KERNEL);
		break;
	}
	case GP_AMDV1: {
		struct pt_iommu_amdv1_cfg cfg = {
			.common.features =
				BIT(PT_FEAT_DYNAMIC_TOP) |
				BIT(PT_FEAT_AMDV1_ENCRYPT_TABLES) |
				BIT(PT_FEAT_AMDV1_FORCE_COHERENCE) |
				BIT(PT_FEAT_FLUSH_RANGE),
			.common.hw_max_vasz_lg2 = width,
			.common.hw_max_oasz_lg2 = 52,
			.starting_level = levels - 1,
		};
		g->domain.ops = &amdv1_dom_ops;
		g->domain.dirty_ops = &amdv1_dirty_ops;
		ret = pt_iommu_amdv1_init(&g->amdv1, &cfg, GFP_KERNEL);
		break;
	}
	case GP_X86_64: {
		struct pt_iommu_x86_64_cfg cfg = {
			.common.features = BIT(PT_FEAT_SIGN_EXTEND) |
					   BIT(PT_FEAT_FLUSH_RANGE) | nc,
			.common.hw_max_vasz_lg2 = width,
			.common.hw_max_oasz_lg2 = 52,
			.top_level = levels - 1,
		};
		g->domain.ops = &x86_64_dom_ops;
		ret = pt_iommu_x86_64_init(&g->x86_64, &cfg, GFP_KERNEL);
		break;
	}
	case GP_RISCV64: {
		struct pt_iommu_riscv_64_cfg cfg = {
			.common.features = BIT(PT_FEAT_SIGN_EXTEND) |
					   BIT(PT_FEAT_FLUSH_RANGE) |
					   BIT(PT_FEAT_RISCV_SVNAPOT_64K) |
					   BIT(PT_FEAT_DETAILED_GATHER),
			.common.hw_max_vasz_lg2 = width,
			.common.hw_max_oasz_lg2 = 56,
		};
		g->domain.ops = &riscv_64_dom_ops;
		ret = pt_iommu_riscv_64_init(&g->riscv64, &cfg, GFP_KERNEL);
		break;
	}
	case GP_MOCK: {
		struct pt_iommu_amdv1_mock_cfg cfg = {
			.common.hw_max_vasz_lg2 = width,
			.common.hw_max_oasz_lg2 = 51,
			.starting_level = levels - 1,
		};
		g->domain.ops = &amdv1_mock_dom_ops;
		g->domain.dirty_ops = &amdv1_mock_dirty_ops;
		ret = pt_iommu_amdv1_mock_init(&g->mock, &cfg, GFP_KERNEL);
		break;
	}
	}
	*err = ret;
	if (ret) {
		g->used = 0;
		return NULL;
	}
	return g;
}

struct pt_iommu *gp_iommu(struct gp *g) { return &g->iommu; }

void gp_close(struct gp *g)
{
	pt_iommu_deinit(&g->iommu);
	g->used = 0;
}

unsigned long gp_root(struct gp *g, unsigned int *levels)
{
	switch (formats[g->fmt].family) {
	case GP_VTDSS: {
		struct pt_iommu_vtdss_hw_info i;

		pt_iommu_vtdss_hw_info(&g->vtdss, &i);
		*levels = i.aw + 2;
		return i.ssptptr;
	}
	case GP_AMDV1: {
		struct pt_iommu_amdv1_hw_info i;

		pt_iommu_amdv1_hw_info(&g->amdv1, &i);
		*levels = i.mode;
		return i.host_pt_root;
	}
	case GP_X86_64: {
		struct pt_iommu_x86_64_hw_info i;

		pt_iommu_x86_64_hw_info(&g->x86_64, &i);
		*levels = i.levels;
		return i.gcr3_pt;
	}
	case GP_MOCK:
		/* no hardware, no way to ask for it */
		*levels = 0;
		return 0;
	default: {
		struct pt_iommu_riscv_64_hw_info i;

		pt_iommu_riscv_64_hw_info(&g->riscv64, &i);
		*levels = i.fsc_iosatp_mode - 5;
		return i.ppn << 12;
	}
	}
}

/* ---- calls and loops --------------------------------------------------- */

static __always_inline int one_map(struct gp *g, unsigned long iova,
				   unsigned long pa, unsigned long len,
				   int prot, size_t *mapped)
{
	struct pt_iommu *pt = iommupt_from_domain(&g->domain);

	return pt->ops->map_range(pt, iova, pa, len, prot, GFP_KERNEL, mapped);
}
#define RW (IOMMU_READ | IOMMU_WRITE)

static __always_inline size_t one_unmap(struct gp *g, unsigned long iova,
					unsigned long len)
{
	struct pt_iommu *pt = iommupt_from_domain(&g->domain);
	struct iommu_iotlb_gather gather;
	size_t done;

	iommu_iotlb_gather_init(&gather);
	done = pt->ops->unmap_range(pt, iova, len, &gather);
	iommu_iotlb_sync(&g->domain, &gather);
	return done;
}

long gp_map(struct gp *g, unsigned long iova, unsigned long pa,
	    unsigned long len)
{
	size_t mapped = 0;
	int ret = one_map(g, iova, pa, len, RW, &mapped);

	return ret ? ret : (long)mapped;
}

int gp_map_prot(struct gp *g, unsigned long iova, unsigned long pa,
		unsigned long len, int prot)
{
	size_t mapped = 0;
	int ret = one_map(g, iova, pa, len, prot, &mapped);

	/* As iommu_map() does: what was mapped before the error goes again. */
	if (ret && mapped)
		one_unmap(g, iova, mapped);
	return ret;
}

unsigned long gp_unmap(struct gp *g, unsigned long iova, unsigned long len)
{
	return one_unmap(g, iova, len);
}

unsigned long gp_lookup(struct gp *g, unsigned long iova)
{
	return g->domain.ops->iova_to_phys(&g->domain, iova);
}

int gp_set_dirty(struct gp *g, unsigned long iova)
{
	return g->iommu.ops->set_dirty(&g->iommu, iova);
}

static int read_clear_dirty(struct gp *g, unsigned long iova,
			    unsigned long len, struct flat_bitmap *b)
{
	struct iommu_iotlb_gather gather;
	struct iommu_dirty_bitmap dirty;
	int ret;

	iommu_dirty_bitmap_init(&dirty, (struct iova_bitmap *)b, &gather);
	ret = g->domain.dirty_ops->read_and_clear_dirty(&g->domain, iova, len,
							0, &dirty);
	iommu_iotlb_sync(&g->domain, &gather);
	return ret;
}

#ifdef CONFIG_DEBUG_GENERIC_PT
int gp_harvest(struct gp *g, unsigned long iova, unsigned long len,
	       gp_range_fn_t show, void *context)
{
	struct flat_bitmap b = { .show = show, .context = context };

	return read_clear_dirty(g, iova, len, &b);
}
#endif

int gp_read_clear_dirty(struct gp *g, unsigned long iova, unsigned long len,
			unsigned char *bitmap, unsigned long bm_base)
{
	struct flat_bitmap b = { bitmap, bm_base };

	return read_clear_dirty(g, iova, len, &b);
}

unsigned long gp_map_n(struct gp *g, unsigned long iova, unsigned long pa,
		       unsigned long len, unsigned long n)
{
	unsigned long bad = 0;

	for (; n; n--, iova += len, pa += len) {
		size_t mapped = 0;

		if (one_map(g, iova, pa, len, RW, &mapped))
			bad++;
	}
	return bad;
}

unsigned long gp_newtable_n(struct gp *g, unsigned long iova, unsigned long pa,
			    unsigned long stride, unsigned long n)
{
	unsigned long bad = 0;

	for (; n; n--, iova += stride, pa += PAGE_SIZE) {
		size_t mapped = 0;

		if (one_map(g, iova, pa, PAGE_SIZE, RW, &mapped))
			bad++;
	}
	return bad;
}

unsigned long gp_unmap_n(struct gp *g, unsigned long iova, unsigned long len,
			 unsigned long n)
{
	unsigned long bad = 0;

	for (; n; n--, iova += len)
		bad += one_unmap(g, iova, len) != len;
	return bad;
}

unsigned long gp_pair_n(struct gp *g, unsigned long iova, unsigned long pa,
			unsigned long len, unsigned long n)
{
	unsigned long bad = 0;

	for (; n; n--) {
		size_t mapped = 0;

		if (one_map(g, iova, pa, len, RW, &mapped))
			bad++;
		bad += one_unmap(g, iova, len) != len;
	}
	return bad;
}

/*
 * Random lookups.  Address = base + (top `bits` of a 64-bit LCG << shift) +
 * 0x128.  When dependent, the next LCG state takes the previous result in, so
 * calls cannot overlap; otherwise the CPU may overlap them.
 */
unsigned long gp_lookup_n(struct gp *g, unsigned long base, unsigned int shift,
			  unsigned int bits, unsigned long n, int dependent,
			  unsigned long pa_minus_iova)
{
	unsigned long x = 0x9e3779b97f4a7c15UL, bad = 0, fold = 0;

	for (; n; n--) {
		unsigned long iova, pa;

		x = (x ^ fold) * 6364136223846793005UL + 1442695040888963407UL;
		iova = base + ((x >> (64 - bits)) << shift) + 0x128;
		pa = g->domain.ops->iova_to_phys(&g->domain, iova);
		bad += pa != iova + pa_minus_iova;
		if (dependent)
			fold = pa;
	}
	return bad;
}

unsigned long gp_pool_cycle(unsigned long n)
{
	for (; n; n--) {
		void *p = iommu_alloc_pages_node_sz(NUMA_NO_NODE, GFP_KERNEL,
						    PAGE_SIZE);

		iommu_free_pages(p);
	}
	return 0;
}
