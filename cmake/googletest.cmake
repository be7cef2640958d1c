# GoogleTest for NI_TESTS=ON, from the first place that has it:
#   1. an installed one (Debian: libgtest-dev, Fedora: gtest-devel),
#   2. the sources that `pip install 'nano-inference[test]'` puts under the Python prefix,
#   3. a pinned release, fetched.
# A plain build (pip install .) never comes here.
find_package(GTest QUIET)
if(GTest_FOUND)
  return()
endif()

find_package(Python 3.10 COMPONENTS Interpreter)
set(gtest_dir)
if(Python_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sys; print(sys.prefix + '/src/gtest_vendor')"
    OUTPUT_VARIABLE gtest_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(EXISTS ${gtest_dir}/src/gtest-all.cc)
  message(STATUS "nano-inference: GoogleTest from ${gtest_dir}")
  add_library(gtest_main STATIC ${gtest_dir}/src/gtest-all.cc ${gtest_dir}/src/gtest_main.cc)
  target_include_directories(gtest_main SYSTEM PUBLIC ${gtest_dir}/include PRIVATE ${gtest_dir})
  target_link_libraries(gtest_main PUBLIC Threads::Threads)
  add_library(GTest::gtest_main ALIAS gtest_main)
  return()
endif()

message(STATUS "nano-inference: GoogleTest is not installed; fetching release 1.14.0. Without a "
  "network: pip install 'nano-inference[test]' or apt-get install libgtest-dev")
include(FetchContent)
set(INSTALL_GTEST OFF)
set(BUILD_GMOCK OFF)
FetchContent_Declare(googletest
  URL https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz
  URL_HASH SHA256=8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7
  DOWNLOAD_EXTRACT_TIMESTAMP TRUE)
FetchContent_MakeAvailable(googletest)
