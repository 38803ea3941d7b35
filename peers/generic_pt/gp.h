/* SPDX-License-Identifier: GPL-2.0-only */
/* Plain-C boundary between glue.c and dump.c (compiled against the kernel's
 * headers) and the programs main.c and driver.c (compiled against libc).  Only
 * basic types cross it. */
#ifndef GP_H
#define GP_H

struct gp;
struct pt_iommu;

struct gp_counters {
	unsigned long allocs;		/* table pages handed out, ever */
	unsigned long frees;		/* table pages taken back, ever */
	unsigned long syncs;		/* IOTLB syncs (stubbed to no hardware work) */
	unsigned long top_changes;	/* driver_ops->change_top calls */
	unsigned long dirty_sets;	/* iova_bitmap_set calls */
	unsigned long clflushes;	/* clflush_cache_range calls */
};
extern struct gp_counters gp_cnt;

/* Set by arena.c, read by the kernel's virt<->phys<->struct page helpers. */
extern unsigned long phys_base, page_offset_base, vmemmap_base;

unsigned long gp_struct_page_size(void);
void gp_pool_init(void *arena, unsigned long npages);
unsigned long gp_pool_cycle(unsigned long n);	/* n alloc+zero+free pairs */

/* arena.c */
void *gp_map_memory(unsigned long bytes);
void gp_setup_memory(unsigned long table_pages);

int gp_nformats(void);
const char *gp_name(int fmt);
int gp_has_dirty(int fmt);
int gp_is_benched(int fmt);
int gp_family(int fmt);			/* GP_VTDSS.. : how to decode an entry */
enum { GP_VTDSS, GP_AMDV1, GP_X86_64, GP_RISCV64, GP_MOCK };

struct gp *gp_open(int fmt, int *err);
void gp_close(struct gp *g);
unsigned long gp_root(struct gp *g, unsigned int *levels);
void *gp_phys_to_virt(unsigned long pa);
struct pt_iommu *gp_iommu(struct gp *g);

/* one call each; gp_map returns bytes mapped or -errno */
long gp_map(struct gp *g, unsigned long iova, unsigned long pa, unsigned long len);
unsigned long gp_unmap(struct gp *g, unsigned long iova, unsigned long len);
/* 0 or -errno; after an error nothing is mapped, as after iommu_map() */
int gp_map_prot(struct gp *g, unsigned long iova, unsigned long pa,
		unsigned long len, int prot);
unsigned long gp_lookup(struct gp *g, unsigned long iova);
int gp_set_dirty(struct gp *g, unsigned long iova);
int gp_read_clear_dirty(struct gp *g, unsigned long iova, unsigned long len,
			unsigned char *bitmap, unsigned long bm_base);

/* timed loops; return the number of failed calls (0 expected) */
/* Shows what is dirty, leaf by leaf, and makes it clean.  Flavour check only. */
typedef void (*gp_range_fn_t)(void *context, unsigned long iova,
			      unsigned long len);
int gp_harvest(struct gp *g, unsigned long iova, unsigned long len,
	       gp_range_fn_t show, void *context);

unsigned long gp_map_n(struct gp *g, unsigned long iova, unsigned long pa,
		       unsigned long len, unsigned long n);
unsigned long gp_unmap_n(struct gp *g, unsigned long iova, unsigned long len,
			 unsigned long n);
unsigned long gp_newtable_n(struct gp *g, unsigned long iova, unsigned long pa,
			    unsigned long stride, unsigned long n);
unsigned long gp_pair_n(struct gp *g, unsigned long iova, unsigned long pa,
			unsigned long len, unsigned long n);
unsigned long gp_lookup_n(struct gp *g, unsigned long base, unsigned int shift,
			  unsigned int bits, unsigned long n, int dependent,
			  unsigned long pa_minus_iova);

/* dump.c, once for each family: shows the entries that are not empty, ascending
 * and each table's entry before those below it */
typedef void (*gp_entry_fn_t)(void *context, int leaf, unsigned int level,
			      unsigned long iova, unsigned long long entry);
int gp_dump_vtdss(struct pt_iommu *table, gp_entry_fn_t show, void *context);
int gp_dump_amdv1(struct pt_iommu *table, gp_entry_fn_t show, void *context);
int gp_dump_x86_64(struct pt_iommu *table, gp_entry_fn_t show, void *context);
int gp_dump_riscv64(struct pt_iommu *table, gp_entry_fn_t show, void *context);
int gp_dump_mock(struct pt_iommu *table, gp_entry_fn_t show, void *context);
#endif
