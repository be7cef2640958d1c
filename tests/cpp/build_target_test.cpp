// Which cards a build of the CUDA backend is for, without a card.
#include "../../cuda/build_target.h"

#include <gtest/gtest.h>

namespace ni::cuda {
namespace {

TEST(BuildTarget, RunsOnTheSameMajorVersionFromItsMinorOneOn) {
  EXPECT_TRUE(runs_on("80", 8, 0));
  EXPECT_TRUE(runs_on("80", 8, 9));
  EXPECT_FALSE(runs_on("89", 8, 0));
  EXPECT_FALSE(runs_on("80", 9, 0));
  EXPECT_TRUE(runs_on("90a", 9, 0));
  EXPECT_FALSE(runs_on("100a", 10, 3));
  EXPECT_TRUE(runs_on("100f", 10, 3));
  EXPECT_TRUE(runs_on("120", 12, 1));
}

TEST(BuildTarget, ACardThatIsNotInTheBuildIsToldHowToGetIn) {
  EXPECT_EQ(why_not_usable("H100", 9, 0, "80,89,90a"), "");
  EXPECT_EQ(why_not_usable("A10", 8, 6, "80,89,90a"), "");
  EXPECT_EQ(why_not_usable("V100", 7, 0, "80,89,90a"),
            "V100 has compute capability 7.0; the CUDA backend needs 8.0 or later");
  EXPECT_EQ(why_not_usable("B200", 10, 0, "80,89,90a"),
            "B200 has compute capability 10.0, and this build is for 80,89,90a; build again with "
            "-DNI_CUDA_ARCHITECTURES=100");
  EXPECT_NE(why_not_usable("A100", 8, 0, "90a"), "");
  EXPECT_NE(why_not_usable("A100", 8, 0, "8"), "");
  EXPECT_NE(why_not_usable("A100", 8, 0, ""), "");
}

}  // namespace
}  // namespace ni::cuda
