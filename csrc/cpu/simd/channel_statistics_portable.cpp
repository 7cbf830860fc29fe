#include "channel_statistics.h"

#include "portable.h"

#include "channel_statistics_body.h"

#include "target_end.h"

const ciema::cpu::ChannelStatistics ciema::cpu::kPortableChannelStatistics = ciema::cpu::kTable;
