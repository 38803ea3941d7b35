// SPDX-License-Identifier: GPL-2.0-only
/*
 * Shows every entry of a table that is not empty, as the kernel's own code for
 * the format reads it.  Compiled once for each format, with that format's
 * header, next to the unchanged fmt/iommu_*.c:
 *
 *   GP_FORMAT_HEADER  the format's header, "fmt/vtdss.h" say
 *   GP_DUMP           the name of the function that this file then defines
 *   GP_FORMAT         as the kernel's PT_FMT (and GP_VARIANT as PT_FMT_VARIANT)
 */
#include <linux/args.h>
#include <linux/stringify.h>

#define PT_FMT GP_FORMAT
#ifdef GP_VARIANT
#define PT_FMT_VARIANT GP_VARIANT
#define PTPFX CONCATENATE(CONCATENATE(CONCATENATE(PT_FMT, _), PT_FMT_VARIANT), _)
#else
#define PTPFX CONCATENATE(PT_FMT, _)
#endif
/* What a table really has is in its pt_common; nothing is compiled out here. */
#define PT_SUPPORTED_FEATURES (~0U)

#include <linux/generic_pt/common.h>
#include GP_FORMAT_HEADER
#include "pt_common.h"
#include "pt_iter.h"
#include "gp.h"

struct dump_args {
	gp_entry_fn_t show;
	void *context;
};

/*
 * Not for_each_pt_level_entry(): that steps over the other items of an entry
 * that takes several, and they are to be compared too.
 */
static int dump_level(struct pt_range *range, void *arg, unsigned int level,
		      struct pt_table_p *table)
{
	struct pt_state pts = pt_init(range, level, table);
	struct dump_args *args = arg;
	int ret;

	for (_pt_iter_first(&pts); pts.index < pts.end_index; pts.index++) {
		pt_index_to_va(&pts);
		pt_load_entry(&pts);
		if (pts.type == PT_ENTRY_EMPTY)
			continue;
		/* levels count from 1 on the other side */
		args->show(args->context, pts.type == PT_ENTRY_OA, level + 1,
			   range->va, pts.entry);
		if (pts.type == PT_ENTRY_TABLE) {
			ret = pt_descend(&pts, arg, dump_level);
			if (ret)
				return ret;
		}
	}
	return 0;
}

int GP_DUMP(struct pt_iommu *iommu_table, gp_entry_fn_t show, void *context)
{
	struct pt_common *common = common_from_iommu(iommu_table);
	struct dump_args args = { show, context };
	struct pt_range range = pt_top_range(common);
	int ret = pt_walk_range(&range, dump_level, &args);

	if (ret || !pt_feature(common, PT_FEAT_SIGN_EXTEND))
		return ret;
	range = pt_upper_range(common);
	return pt_walk_range(&range, dump_level, &args);
}
