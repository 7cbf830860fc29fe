#include "channel_statistics.h"

#ifdef CIEMA_X86_SIMD
#include "avx2.h"

#include "channel_statistics_body.h"

#include "target_end.h"

const ciema::cpu::ChannelStatistics ciema::cpu::kAvx2ChannelStatistics = ciema::cpu::kTable;
#endif
