// A group of devices that run fused calls together: their workspaces, and the meetings of their host threads. All
// programs of a group share its workspaces: a device runs them one after the other, and two ranks that run them in
// different orders notice it by the signature of the call (peers.h).
//
// Threads of all local ranks meet before anything is allocated (a device may not allocate or load code while another
// one spins in a kernel of the same group: the driver would wait for it), and once more before the first launch of each
// call site, when every device has loaded all that its program needs. Every meeting ends in time, with an error that
// names who did not come.
#pragma once
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "peer_driver.h"

namespace jaxnorm::distributed {

constexpr int kMaxRanks = 8;                                                    // peers.h
constexpr size_t kHeaderBytes = (128 + 2 * 1024 * 8 * 8 + 1023) / 1024 * 1024;  // peers.h
// A device id is that of its process: kProcess * process + ordinal there.
constexpr int64_t kProcess = 4096;

struct Key {
  bool hip;
  std::vector<int64_t> devices;  // by rank
  bool operator<(const Key& o) const { return std::tie(hip, devices) < std::tie(o.hip, o.devices); }
};

class Group {
 public:
  explicit Group(Key key, int64_t process) : key_(std::move(key)), process_(process) {
    for (size_t r = 0; r < key_.devices.size(); ++r)
      if (key_.devices[r] / kProcess == process) local_.insert(int(r));
  }

  int ranks() const { return int(key_.devices.size()); }
  const Key& key() const { return key_; }
  bool spans_processes() const { return int(local_.size()) != ranks(); }

  // Which rank a device of this process is; -1 for none.
  int RankOf(int ordinal) const {
    for (int r : local_)
      if (key_.devices[size_t(r)] % kProcess == ordinal) return r;
    return -1;
  }

  // Empty, or why the group must not be used: a kernel's wait failed.
  std::string Broken() const {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int r : local_) {
      const volatile uint32_t* word = words_[r];
      const uint32_t code = word == nullptr ? 0 : *word;
      if (code != 0 && (code & 15u) != 3) return Explain(r, code);
    }
    for (int r : local_)
      if (words_[r] != nullptr && *words_[r] != 0) return Explain(r, *words_[r]);
    return "";
  }

  // Called by every local rank with its device current: afterwards all ranks' workspaces have halves of at least
  // `half_bytes`.
  std::string Prepare(const PeerDriver& driver, int rank, uint64_t half_bytes, double seconds) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!problem_.empty()) return problem_;
      if (ready_ && half_bytes <= half_bytes_) return "";
      if (spans_processes())
        return ready_ ? "the workspace that was connected has halves of " + std::to_string(half_bytes_) + " bytes, " +
                            std::to_string(half_bytes) + " are needed"
                      : "the processes are not connected: call jaxnorm.distributed.connect";
    }
    void* context = nullptr;
    int device = 0;
    char* before = nullptr;
    if (int status = driver.Current(&device, &context)) return driver.Describe("no current device", status);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      contexts_[rank] = context;
      before = spaces_[rank];
      if (half_bytes > wanted_) wanted_ = std::max(half_bytes, 2 * wanted_);  // what was too small is never freed
    }
    // Everything that was launched before on any of the devices has been: it ends by itself.
    if (std::string late = Meet(rank, seconds, "prepare a call"); !late.empty()) return late;
    Note(Enable(driver, rank, device));
    if (int status = driver.Synchronize()) Note(driver.Describe("waiting for the device", status));
    if (std::string late = Meet(rank, seconds, "prepare a call"); !late.empty()) return late;
    if (Problem().empty()) Note(AllocateFor(driver, rank));
    if (std::string late = Meet(rank, seconds, "prepare a call"); !late.empty()) return late;
    std::lock_guard<std::mutex> lock(mutex_);
    if (!problem_.empty()) {  // another rank has none: nobody will ever use this one
      if (spaces_[rank] != before) driver.Free(std::exchange(spaces_[rank], before));
      return problem_;
    }
    ready_ = true;
    half_bytes_ = wanted_;
    return "";
  }

  // The first launch of a call site waits until all local ranks are there.
  std::string MeetOnce(int64_t site, int rank, double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::set<int>& there = sites_[site];
    if (there.size() == local_.size()) return "";
    there.insert(rank);
    changed_.notify_all();
    if (changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return there.size() == local_.size(); }))
      return "";
    const std::string missing = Missing(there);
    there.erase(rank);
    return missing + " did not come to launch the call within " + Seconds(seconds);
  }

  // Workspaces by distance from `rank`, and the word for its failures.
  void Pointers(int rank, char* (&base)[kMaxRanks], char** word, uint64_t* half_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int d = 0; d < kMaxRanks; ++d) base[d] = d < ranks() ? spaces_[(rank + d) % ranks()] : nullptr;
    *word = device_words_[rank];
    *half_bytes = half_bytes_;
  }

  // After a failure, with all devices idle: as new.
  std::string Reset(const PeerDriver& driver) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int r : local_) {
      if (spaces_[r] == nullptr) continue;
      if (int status = driver.MakeCurrent(int(key_.devices[size_t(r)] % kProcess)))
        return driver.Describe("making a device current", status);
      if (int status = driver.Synchronize()) return driver.Describe("waiting for the device", status);
      if (int status = driver.Zero(spaces_[r], kHeaderBytes)) return driver.Describe("clearing a workspace", status);
      *words_[r] = 0;
    }
    return "";
  }

  // Several processes: this rank's own workspace, to be handed to the others ...
  std::string Create(const PeerDriver& driver, int rank, uint64_t half_bytes, IpcHandle* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_ = half_bytes;
    if (std::string problem = Allocate(driver, rank); !problem.empty()) return problem;
    if (int status = driver.Export(handle, spaces_[rank])) {
      driver.Free(std::exchange(spaces_[rank], nullptr));
      return driver.Describe("exporting a workspace", status);
    }
    return "";
  }
  // ... and theirs, handed to it.
  std::string Connect(const PeerDriver& driver, int rank, const IpcHandle* handles) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int r = 0; r < ranks(); ++r) {
      if (r == rank) continue;
      const int status = driver.Import(&spaces_[r], handles[r]);
      if (status == 0) continue;
      const int failed = r;
      while (--r >= 0)
        if (r != rank) driver.Close(std::exchange(spaces_[r], nullptr));
      return driver.Describe(("mapping the workspace of " + Name(failed)).c_str(), status);
    }
    ready_ = true;
    half_bytes_ = wanted_;
    return "";
  }

  std::string Name(int rank) const {
    const int64_t id = key_.devices[size_t(rank)];
    std::string name = "rank " + std::to_string(rank) + " (device " + std::to_string(id % kProcess);
    if (spans_processes()) name += " of process " + std::to_string(id / kProcess);
    return name + ")";
  }

 private:
  static std::string Seconds(double s) {
    std::string text = std::to_string(s);
    return text.substr(0, text.find('.') + 2) + " s";
  }
  std::string Explain(int rank, uint32_t code) const {
    const int from = int(code >> 8);
    const std::string who = from < ranks() ? Name(from) : "a rank";
    const std::string phase = code >> 4 & 15u ? "results" : "partial sums";
    switch (code & 15u) {
      case 1:
        return Name(rank) + " waited for the " + phase + " of " + who + ", which did not come in time";
      case 2:
        return Name(rank) + " met " + who + " in another call: the ranks run different programs";
      default:
        return Name(rank) + " was told that another rank gave up while it waited for " + who;
    }
  }
  std::string Missing(const std::set<int>& there) const {
    std::string names;
    for (int r : local_)
      if (!there.count(r)) names += (names.empty() ? "" : ", ") + Name(r);
    return names;
  }
  void Note(const std::string& problem) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (problem_.empty()) problem_ = problem;
  }
  std::string Problem() {
    std::lock_guard<std::mutex> lock(mutex_);
    return problem_;
  }

  // All local ranks; the last one in lets everybody go.
  std::string Meet(int rank, double seconds, const char* what) {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t turn = turn_;
    meeting_.insert(rank);
    if (meeting_.size() == local_.size()) {
      meeting_.clear();
      ++turn_;
      changed_.notify_all();
      return "";
    }
    if (changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return turn_ != turn; })) return "";
    const std::string missing = Missing(meeting_);
    meeting_.erase(rank);
    return missing + " did not come to " + what + " within " + Seconds(seconds);
  }

  std::string Enable(const PeerDriver& driver, int rank, int device) {
    for (int r : local_) {
      if (r == rank) continue;
      bool reaches = false;
      const int peer = int(key_.devices[size_t(r)] % kProcess);
      if (int status = driver.EnablePeer(device, peer, contexts_[r], &reaches))
        return driver.Describe("enabling peer access", status);
      if (!reaches) return Name(rank) + " cannot map the memory of " + Name(r) + " (no peer access)";
    }
    return "";
  }
  std::string AllocateFor(const PeerDriver& driver, int rank) {
    std::lock_guard<std::mutex> lock(mutex_);
    return Allocate(driver, rank);
  }
  // A workspace that is too small stays: a recorded graph may hold its address.
  std::string Allocate(const PeerDriver& driver, int rank) {
    const uint64_t bytes = kHeaderBytes + 2 * wanted_;
    char* space = nullptr;
    if (int status = driver.Allocate(&space, bytes))
      return driver.Describe(("allocating a workspace of " + std::to_string(bytes) + " bytes on " + Name(rank) +
                              " beside XLA's pool (XLA_PYTHON_CLIENT_MEM_FRACTION)")
                                 .c_str(),
                             status);
    if (words_[rank] == nullptr)
      if (int status = driver.AllocateWord(&words_[rank], &device_words_[rank])) {
        driver.Free(space);
        return driver.Describe("allocating a word of host memory", status);
      }
    spaces_[rank] = space;
    return "";
  }

  const Key key_;
  const int64_t process_;
  std::set<int> local_;
  mutable std::mutex mutex_;  // of everything below
  std::condition_variable changed_;
  std::set<int> meeting_;
  uint64_t turn_ = 0;
  std::map<int64_t, std::set<int>> sites_;
  std::string problem_;
  bool ready_ = false;
  uint64_t wanted_ = 0, half_bytes_ = 0;
  void* contexts_[kMaxRanks] = {};
  char* spaces_[kMaxRanks] = {};
  volatile uint32_t* words_[kMaxRanks] = {};
  char* device_words_[kMaxRanks] = {};
};

// All groups of the process; they are never freed.
class Groups {
 public:
  static Groups& Get() {
    static auto* groups = new Groups;
    return *groups;
  }
  Group& Find(const Key& key, int64_t process) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<Group>& group = groups_[key];
    if (group == nullptr) group = std::make_unique<Group>(key, process);
    return *group;
  }
  template <typename F> void Each(F use) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, group] : groups_) use(*group);
  }

 private:
  std::mutex mutex_;
  std::map<Key, std::unique_ptr<Group>> groups_;
};

}  // namespace jaxnorm::distributed
